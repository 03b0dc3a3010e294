"""Layers in 8 bits beside the float layer with the same weights, and beside their own definition in float64."""

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.functional import linear

from fewbits.models.linear import QuantHead, QuantLinear, keep_compute_dtype
from fewbits.tensors.quantized import QuantizedTensor, quantize_per_channel

BOTH = pytest.mark.parametrize("kind", [QuantLinear, QuantHead])
EPS = torch.finfo(torch.float32).eps


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def make(kind: type[QuantLinear], N: int, K: int, *, bias: bool = True) -> tuple[QuantLinear, QuantizedTensor, Any]:
    weight = quantize_per_channel(random(N, K, seed=1))
    b = random(N, seed=2) if bias else None
    return kind(weight, b), weight, b


def bound(kind: type[QuantLinear], x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """How far a result may be from the float layer's: half a step of the last digit of x, times the weights' sum."""
    step = x.double().abs().amax(-1, keepdim=True) / 127
    if kind is QuantHead:
        step = step / 254  # the second digit's step: half a step of the first is the largest that is left of x
    rounding = 8 * EPS * x.double().abs().amax(-1, keepdim=True)
    return (step / 2 * (1 + 1e-4) + rounding) * weight.double().abs().sum(1) + 8 * EPS


@BOTH
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    ("shape", "N"),
    [
        ((5, 64), 32),
        ((1, 64), 64),
        ((3, 1), 1),
        ((7, 3), 33),  # K no multiple of 4, N none of 32
        ((2, 65), 31),
        ((2, 3, 130), 70),
        ((2, 1, 3, 16), 5),
        ((16,), 8),
        ((130, 257), 95),
    ],
    ids=str,
)
def test_the_error_is_that_of_the_activations(
    kind: type[QuantLinear], shape: tuple[int, ...], N: int, bias: bool
) -> None:
    layer, weight, b = make(kind, N, shape[-1], bias=bias)
    x = random(*shape)
    y = layer(x)
    assert (y.dtype, y.shape) == (torch.float32, (*shape[:-1], N))
    exact = linear(x.double(), weight.dequantize().double(), None if b is None else b.double())
    assert ((y - exact).abs() <= bound(kind, x, weight.dequantize())).all()


def test_the_bound_is_tight() -> None:
    layer, weight, _ = make(QuantLinear, 64, 64, bias=False)
    x = random(64, 64)
    error = (layer(x) - linear(x.double(), weight.dequantize().double())).abs()
    assert (error / bound(QuantHead, x, weight.dequantize())).max() > 1, "one digit does not reach two digits' bound"
    assert (error / bound(QuantLinear, x, weight.dequantize())).max() > 0.1


@BOTH
@pytest.mark.parametrize("shape", [(0, 16), (2, 0, 16)], ids=str)
def test_no_tokens(kind: type[QuantLinear], shape: tuple[int, ...]) -> None:
    layer, _, _ = make(kind, 8, 16)
    assert layer(torch.empty(shape)).shape == (*shape[:-1], 8)


@BOTH
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_dtype_is_that_of_the_input(kind: type[QuantLinear], dtype: torch.dtype) -> None:
    layer, _, _ = make(kind, 40, 64)
    x = random(3, 64).to(dtype)
    assert layer(x).dtype == dtype
    assert torch.equal(layer(x), layer(x.float()).to(dtype)), "computed in float32, rounded once"


@BOTH
def test_inputs_of_any_strides(kind: type[QuantLinear]) -> None:
    layer, _, _ = make(kind, 40, 64)
    x = random(6, 64)
    assert torch.equal(layer(x.T.contiguous().T), layer(x))
    assert torch.equal(layer(x[::2]), layer(x[::2].contiguous()))
    assert torch.equal(layer(x.view(2, 3, 64).transpose(0, 1)), layer(x).view(2, 3, 40).transpose(0, 1))
    assert torch.equal(layer(x[:1].expand(4, 64)), layer(x[:1]).expand(4, 40))


@BOTH
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_bad_token_spoils_no_other(kind: type[QuantLinear], bad: float) -> None:
    layer, _, _ = make(kind, 40, 64)
    x = random(4, 64)
    clean = layer(x)
    x[2, 7] = bad
    y = layer(x)
    assert y[2].isnan().all()
    assert torch.equal(y[[0, 1, 3]], clean[[0, 1, 3]])


@BOTH
def test_a_token_does_not_depend_on_its_batch(kind: type[QuantLinear]) -> None:
    layer, _, _ = make(kind, 95, 130)
    x = random(67, 130)
    assert torch.equal(torch.cat([layer(token[None]) for token in x]), layer(x))


@BOTH
def test_a_token_of_zeros_gives_the_bias(kind: type[QuantLinear]) -> None:
    layer, _, b = make(kind, 40, 64)
    assert torch.equal(layer(torch.zeros(2, 64)), b.expand(2, 40))


@BOTH
def test_the_weight_comes_back(kind: type[QuantLinear]) -> None:
    layer, weight, _ = make(kind, 33, 7)
    back = layer.quantized_weight()
    assert torch.equal(back.codes, weight.codes)
    assert torch.equal(back.scales, weight.scales)


@pytest.mark.parametrize(("scale_dtype", "bits"), [(torch.float32, 32), (torch.bfloat16, 16)])
def test_bits_count_the_stored_scales(scale_dtype: torch.dtype, bits: int) -> None:
    layer = QuantLinear(quantize_per_channel(random(33, 7), scale_dtype=scale_dtype))
    assert layer.quantized_bits() == (33 * 7 * 8 + 33 * bits, 33 * 7)


def test_it_moves_and_prints_like_a_module() -> None:
    layer, _, _ = make(QuantLinear, 40, 64)
    again, _, _ = make(QuantLinear, 40, 64, bias=True)
    again.weight.zero_()
    again.load_state_dict(layer.state_dict())
    x = random(2, 64)
    assert torch.equal(again(x), layer(x))
    assert "in_features=64, out_features=40, bias=True" in repr(layer)


def test_an_embedding_in_16_bits_gives_the_compute_dtype() -> None:
    embedding = nn.Embedding(10, 4, dtype=torch.bfloat16)
    ids = torch.tensor([[1, 9]])
    expected = embedding(ids).float()
    keep_compute_dtype(embedding, torch.float32)
    assert embedding(ids).dtype == torch.float32
    assert torch.equal(embedding(ids), expected)
    assert embedding.weight.dtype == torch.bfloat16
