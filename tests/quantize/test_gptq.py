"""GPTQ and least-error scales: what they promise, on weights and inputs that are made here."""

import pytest
import torch
from torch import Tensor

from fewbits.errors import FewbitsError
from fewbits.quantize.gptq import gptq
from fewbits.quantize.least_error import least_error
from fewbits.tensors.quantized import QuantizedTensor, quantize_weight

FORMATS = pytest.mark.parametrize(
    ("format_name", "group_size"), [("int4", 32), ("nf4", 32), ("int8", None), ("e4m3fn", None), ("int8", 64)]
)


def weight_and_inputs(K: int = 128, correlated: bool = True) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(48, K, generator=generator) * torch.rand(48, 1, generator=generator)
    mix = torch.randn(K, K, generator=generator) if correlated else torch.eye(K)
    return weight, torch.randn(400, K, generator=generator) @ mix


def output_error(weight: Tensor, quantized: QuantizedTensor, x: Tensor) -> float:
    return ((x @ (quantized.dequantize() - weight).T).norm() / (x @ weight.T).norm()).item()


@FORMATS
@pytest.mark.parametrize("rotation", [0, 64])
def test_outputs_suffer_less_than_from_rounding_to_nearest(
    format_name: str, group_size: int | None, rotation: int
) -> None:
    weight, x = weight_and_inputs()
    nearest = quantize_weight(weight, format_name, group_size=group_size, rotation=rotation)
    found = gptq(weight, x.T @ x, format_name, group_size=group_size, rotation=rotation)
    assert found.shape == weight.shape
    assert (found.format, found.rotation, found.scales.shape) == (format_name, rotation, nearest.scales.shape)
    assert found.codes.dtype == nearest.codes.dtype
    assert output_error(weight, found, x) < 0.8 * output_error(weight, nearest, x)


@FORMATS
def test_without_correlation_it_is_rounding_to_nearest(format_name: str, group_size: int | None) -> None:
    weight, _ = weight_and_inputs()
    found = gptq(weight, torch.eye(128), format_name, group_size=group_size)
    expected = least_error(weight, format_name, group_size=group_size)
    assert torch.equal(found.scales, expected.scales)
    # 1 % of damping is on the diagonal alone, so nothing is spread and every column is rounded by itself.
    assert torch.equal(found.codes.view(torch.uint8), expected.codes.view(torch.uint8))


@FORMATS
@pytest.mark.parametrize("scale_dtype", [torch.float32, torch.bfloat16])
def test_least_error_scales_are_never_worse(format_name: str, group_size: int | None, scale_dtype: torch.dtype) -> None:
    weight, _ = weight_and_inputs()
    nearest = quantize_weight(weight, format_name, group_size=group_size, scale_dtype=scale_dtype)
    found = least_error(weight, format_name, group_size=group_size, scale_dtype=scale_dtype)
    assert found.scales.dtype == scale_dtype
    error, usual = ((each.dequantize() - weight).square().sum() for each in (found, nearest))
    assert error <= usual


def test_features_that_were_always_0_are_rounded_to_nearest() -> None:
    weight, x = weight_and_inputs()
    x[:, [5, 77]] = 0
    found = gptq(weight, x.T @ x, "int8")
    for feature in (5, 77):
        expected = (weight[:, feature] / found.scales[:, 0]).round().clamp(-127, 127)
        assert torch.equal(found.codes[:, feature].float(), expected)


def test_a_layer_that_saw_nothing_is_still_quantized() -> None:
    weight, _ = weight_and_inputs()
    found = gptq(weight, torch.zeros(128, 128), "int4", group_size=32)
    assert (found.dequantize() - weight).norm() < 0.2 * weight.norm()


def test_bad_input() -> None:
    weight, x = weight_and_inputs()
    moments = x.T @ x
    moments[3, 3] = torch.inf
    with pytest.raises(FewbitsError, match="the calibration gave activations that are NaN or Inf"):
        gptq(weight, moments, "int8")
    weight[0, 0] = torch.nan
    with pytest.raises(FewbitsError, match="weight: it holds NaN or Inf"):
        least_error(weight, "int8")
    with pytest.raises(FewbitsError, match="weight: it holds NaN or Inf"):
        gptq(weight, x.T @ x, "int8")
