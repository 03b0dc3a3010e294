"""int8 weights per channel: no weight is clipped, and none is further than half a step from what it was."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fewbits.errors import FewbitsError
from fewbits.tensors.quantized import QuantizedTensor, quantize_per_channel

SCALES = (torch.float32, torch.bfloat16, torch.float16)
EACH_SCALE = pytest.mark.parametrize("scale_dtype", SCALES, ids=str)


def check(weight: torch.Tensor, quantized: QuantizedTensor, scale_dtype: torch.dtype) -> None:
    N, K = weight.shape
    codes, scales = quantized.codes, quantized.scales
    assert (codes.dtype, codes.shape) == (torch.int8, (N, K))
    assert (scales.dtype, scales.shape) == (scale_dtype, (N, 1))
    assert codes.min() >= -127
    exact, steps = weight.double(), scales.double()
    assert (steps >= torch.finfo(scale_dtype).tiny).all()
    # Half a step, and the last bit of the division's float32 quotient, which can be as large as 127.
    error = (exact - codes.double() * steps).abs()
    assert (error <= steps * (0.5 + 127 * torch.finfo(torch.float32).eps)).all()
    # Rounded up, and to the next number at most: the largest weight has a code, and codes are not wasted.
    amax = exact.abs().amax(1, keepdim=True)
    assert (steps * 127 * (1 + torch.finfo(torch.float32).eps) >= amax).all()
    step_of_scale = 1 + torch.finfo(scale_dtype).eps
    normal = amax / 127 >= torch.finfo(scale_dtype).tiny
    assert (steps <= amax / 127 * step_of_scale * (1 + torch.finfo(torch.float32).eps))[normal].all()


LARGEST = 2.0**22  # / 127 is still a float16
numbers = st.floats(-LARGEST, LARGEST, width=32, allow_subnormal=True)


@settings(max_examples=200, deadline=None)
@given(
    rows=st.integers(1, 5).flatmap(
        lambda K: st.lists(st.lists(numbers, min_size=K, max_size=K), min_size=1, max_size=4)
    ),
    scale_dtype=st.sampled_from(SCALES),
    dtype=st.sampled_from((torch.float32, torch.bfloat16)),
)
def test_every_weight_is_within_half_a_step(
    rows: list[list[float]], scale_dtype: torch.dtype, dtype: torch.dtype
) -> None:
    weight = torch.tensor(rows).to(dtype)
    check(weight, quantize_per_channel(weight, scale_dtype=scale_dtype), scale_dtype)


@EACH_SCALE
@pytest.mark.parametrize("magnitude", [1e-45, 1e-40, 1.2e-38, 1e-20, 6e-8, 1.0, 3e6])
def test_channels_of_any_magnitude(scale_dtype: torch.dtype, magnitude: float) -> None:
    weight = torch.randn(64, 33, generator=torch.Generator().manual_seed(0)).clamp(-2, 2) * magnitude
    check(weight, quantize_per_channel(weight, scale_dtype=scale_dtype), scale_dtype)


@EACH_SCALE
def test_zero_channels_have_a_scale(scale_dtype: torch.dtype) -> None:
    quantized = quantize_per_channel(torch.tensor([[0.0, -0.0], [1.0, 0.0]]), scale_dtype=scale_dtype)
    assert quantized.codes[0].tolist() == [0, 0]
    assert quantized.scales[0] == torch.finfo(scale_dtype).tiny
    assert quantized.dequantize()[0].tolist() == [0, 0]


def test_channels_do_not_share_a_scale() -> None:
    weight = torch.tensor([[1000.0, 1.0], [0.001, 0.002]])
    quantized = quantize_per_channel(weight)
    assert quantized.scales.flatten().tolist() == pytest.approx([1000 / 127, 0.002 / 127])
    assert quantized.codes.tolist() == [[127, 0], [64, 127]]


def test_halves_go_to_even() -> None:
    weight = torch.tensor([[127.0, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5]])  # scale 1
    assert quantize_per_channel(weight).codes.tolist() == [[127, 0, 2, 2, 0, -2, -2]]


@EACH_SCALE
def test_a_scale_is_the_next_larger_number_where_it_is_not_one(scale_dtype: torch.dtype) -> None:
    exact = torch.tensor([1.0, 1 + 2**-12, 1 + 2**-9, 1.999, 2.0])
    scales = quantize_per_channel((exact * 127)[:, None], scale_dtype=scale_dtype).scales.flatten().float()
    digits = 1 / torch.finfo(scale_dtype).eps  # all of these lie in 1…2
    assert torch.equal(scales, (exact * digits).ceil() / digits)


@pytest.mark.parametrize(("bad", "channel"), [(math.nan, 0), (math.inf, 2), (-math.inf, 3)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_nan_and_inf_are_refused(bad: float, channel: int, dtype: torch.dtype) -> None:
    weight = torch.zeros(4, 5, dtype=dtype)
    weight[channel, 3] = bad
    with pytest.raises(FewbitsError, match=f"NaN or Inf in output channel {channel}; repair"):
        quantize_per_channel(weight)


def test_a_scale_beyond_half_precision_is_refused() -> None:
    weight = torch.tensor([[1.0], [65520 * 127.0]])
    with pytest.raises(FewbitsError, match=r"output channel 1 .* 65504"):
        quantize_per_channel(weight, scale_dtype=torch.float16)
    assert quantize_per_channel(weight, scale_dtype=torch.bfloat16).dequantize().isfinite().all()


@pytest.mark.parametrize("shape", [(), (3,), (3, 0), (2, 3, 4)], ids=str)
def test_what_is_no_matrix_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(FewbitsError, match=r"float \[N, K\] with K > 0 is needed, got torch.float32 \["):
        quantize_per_channel(torch.ones(shape))


def test_codes_are_not_quantized_again() -> None:
    with pytest.raises(FewbitsError, match=r"is needed, got torch.int8 \[2, 3\]; reshape or dequantize it"):
        quantize_per_channel(torch.ones(2, 3, dtype=torch.int8))


def test_a_weight_without_channels() -> None:
    assert quantize_per_channel(torch.ones(0, 3)).dequantize().shape == (0, 3)


def test_bytes_and_values() -> None:
    codes = torch.tensor([[1, -2], [3, 4]], dtype=torch.int8)
    quantized = QuantizedTensor(codes, torch.tensor([[0.5], [2.0]]).bfloat16())
    assert quantized.nbytes == 4 + 2 * 2
    assert quantized.dequantize().dtype == torch.float32
    assert quantized.dequantize().tolist() == [[0.5, -1.0], [6.0, 8.0]]


def test_the_weight_itself_is_not_changed() -> None:
    weight = torch.randn(4, 4)
    before = weight.clone()
    quantize_per_channel(weight)
    assert torch.equal(weight, before)
