"""The kernel that quantizes weights gives the bits that plain PyTorch gives."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fewbits.errors import FewbitsError
from fewbits.kernels import native, weight
from fewbits.tensors.quantized import QuantizedTensor, quantize_weight

FLOATS = [torch.float32, torch.bfloat16, torch.float16]


def both(w: torch.Tensor, format_name: str, group: int | None, scales: torch.dtype) -> tuple[QuantizedTensor, ...]:
    """With the kernel, and without it."""
    with_kernel = quantize_weight(w, format_name, group_size=group, scale_dtype=scales)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(weight, "quantize_weight", lambda *args, **options: False)
        return with_kernel, quantize_weight(w, format_name, group_size=group, scale_dtype=scales)


def wide(rows: int, columns: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    """Channels of very different sizes; one of zeros, one of numbers below the smallest normal one, halves of steps."""
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.randn(rows, 1, generator=generator).mul(4).exp().clamp_max(1e3)
    w = torch.randn(rows, columns, generator=generator) * sizes
    w[0] = 0
    w[1] = w[1].sign() * 1e-41
    w[2] = torch.arange(columns) % 255 / 2 - 63.5
    w[3] = -w[3].abs()
    return w.to(dtype)


@pytest.mark.parametrize("scales", FLOATS, ids=str)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize(
    ("format_name", "group", "columns"),
    [("int8", None, 7), ("int8", None, 1), ("int8", 32, 96), ("int4", 32, 96), ("int4", 128, 384), ("int4", None, 130)],
)
def test_the_same_bits(
    format_name: str, group: int | None, columns: int, dtype: torch.dtype, scales: torch.dtype
) -> None:
    found, expected = both(wide(37, columns, dtype), format_name, group, scales)
    assert torch.equal(found.codes, expected.codes)
    assert torch.equal(found.scales, expected.scales)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False, max_value=2**100, min_value=-(2**100)),
                min_size=4, max_size=4))  # fmt: skip
def test_any_four_weights(values: list[float]) -> None:
    w = torch.tensor([values])
    for format_name in ("int8", "int4"):
        found, expected = both(w, format_name, None, torch.bfloat16)
        assert torch.equal(found.codes, expected.codes)
        assert torch.equal(found.scales, expected.scales)


def test_strides_and_threads_make_no_difference() -> None:
    w = wide(300, 256, torch.float32)
    expected = quantize_weight(w, "int4", group_size=64)
    for same in (w.T.contiguous().T, torch.cat([w, w], 1)[:, :256]):
        assert torch.equal(quantize_weight(same, "int4", group_size=64).codes, expected.codes)
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            assert torch.equal(quantize_weight(w, "int4", group_size=64).codes, expected.codes)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_is_refused_by_channel(bad: float) -> None:
    w = wide(9, 64, torch.bfloat16)
    w[7, 5] = bad
    with pytest.raises(FewbitsError, match="NaN or Inf in output channel 7"):
        quantize_weight(w, "int8", scale_dtype=torch.bfloat16)


def test_the_kernel_is_used_where_there_is_one() -> None:
    w = wide(8, 64, torch.bfloat16)
    codes, scales = torch.empty(8, 64, dtype=torch.int8), torch.empty(8, 1)
    options = {"group_size": 64, "rotation": 0, "divisor": 127.0, "lowest": -127, "largest": 127, "packed": False}
    assert weight.quantize_weight(w, codes, scales, **options) == native.status().loaded
