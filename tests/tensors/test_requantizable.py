"""Values in place of codes: quantized again, they give the same codes and scales."""

import pytest
import torch

from fewbits.tensors.quantized import quantize_weight
from fewbits.tensors.requantizable import requantizable


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("spread", [1.0, 1e-3, 0.0], ids=str)
def test_values_give_the_codes_that_they_were_made_of(dtype: torch.dtype, spread: float) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = (torch.randn(20_000, 40, generator=generator) * spread).to(dtype)
    weight[:200] *= torch.logspace(-8, 3, 200)[:, None].to(dtype)
    weight[200:300] = weight[200:300, :1]  # every weight the largest
    weight[300] = 0
    weight[301:400] *= torch.tensor([1.0, *[1e-4] * 39], dtype=dtype)
    made = quantize_weight(weight, "int8", scale_dtype=dtype)
    values = requantizable(made, dtype)
    again = quantize_weight(values, "int8", scale_dtype=dtype)
    assert values.dtype == dtype
    assert torch.equal(again.scales, made.scales)
    assert torch.equal(again.codes, made.codes)
    assert ((values.float() - made.dequantize()).abs() <= made.scales.float() * 0.5).all()


def test_plain_rounding_would_not_do() -> None:
    weight = torch.randn(1000, 40, generator=torch.Generator().manual_seed(0)).bfloat16()
    made = quantize_weight(weight, "int8", scale_dtype=torch.bfloat16)
    again = quantize_weight(made.dequantize().bfloat16(), "int8", scale_dtype=torch.bfloat16)
    assert not torch.equal(again.scales, made.scales)
