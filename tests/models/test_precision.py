"""The precisions by name, and casts that lose no large value silently."""

import math

import pytest
import torch

from fewbits.errors import FewbitsError
from fewbits.models.precision import PRECISIONS, TORCH_DTYPES, cast_weight, precision_named


@pytest.mark.parametrize("name", PRECISIONS)
def test_every_name_is_found(name: str) -> None:
    precision = precision_named(name)
    assert precision.name == name
    assert precision.cast == (name in TORCH_DTYPES)
    assert precision.summary


@pytest.mark.parametrize(("name", "nearest"), [("int9", "int8"), ("INT8", "int8"), ("f16", "fp16"), ("bf-16", "bf16")])
def test_the_nearest_name_is_suggested(name: str, nearest: str) -> None:
    with pytest.raises(FewbitsError, match=f"precision '{name}' is unknown; did you mean {nearest}.*known: fp32, bf16"):
        precision_named(name)


@pytest.mark.parametrize("dtype", TORCH_DTYPES.values(), ids=str)
def test_a_cast_rounds_and_keeps_nan_and_inf(dtype: torch.dtype) -> None:
    weight = torch.tensor([0.1, -0.0, 1e-45, math.nan, math.inf, -math.inf, 65504])
    assert torch.equal(cast_weight("w", weight, dtype).nan_to_num(7.0), weight.to(dtype).nan_to_num(7.0))
    assert cast_weight("w", torch.empty(0, 3), dtype).shape == (0, 3)


@pytest.mark.parametrize("other", [0.0, math.nan, math.inf])
@pytest.mark.parametrize(("value", "dtype", "name"), [(65520, torch.float16, "fp16"), (3.4e38, torch.bfloat16, "bf16")])
def test_a_value_beyond_the_largest_number_is_refused(
    value: float, dtype: torch.dtype, name: str, other: float
) -> None:
    for sign in (1, -1):
        with pytest.raises(FewbitsError, match=rf"w: -?[\d.e+]+ is beyond {name}, whose largest number is"):
            cast_weight("w", torch.tensor([other, sign * value]), dtype)
    cast_weight("w", torch.tensor([other, value * 0.99]), dtype)
