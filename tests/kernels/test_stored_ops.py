"""Weights as they are stored: the op's meaning beside float64, its schema, its gradient and its messages."""

from typing import Any

import pytest
import torch

from fewbits.errors import FewbitsError
from fewbits.kernels import ops, stored_ops
from fewbits.kernels.panel_reference import round_tokens
from fewbits.tensors.quantized import quantize_weight

EPS = torch.finfo(torch.float32).eps
KINDS = [
    ("int8", None, "int8"), ("int8", 32, "int8"), ("int8", 32, None), ("int4", 32, "int8"), ("nf4", 64, None),
    ("e2m1fn", 32, None),    ("e4m3fn", None, "e4m3fn"),
]  # fmt: skip


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def arguments(format_name: str, group: int | None, N: int = 6, K: int = 128) -> tuple[Any, dict[str, Any]]:
    weight = quantize_weight(random(N, K, seed=1), format_name, group_size=group)
    return weight, {"codes": weight.codes.view(torch.int8), "scales": weight.scales, "bias": random(N, seed=2)}


@pytest.mark.parametrize(("format_name", "group", "activations"), KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_its_meaning(format_name: str, group: int | None, activations: str | None, dtype: torch.dtype) -> None:
    weight, given = arguments(format_name, group)
    x = random(2, 3, 128).to(dtype)
    got = stored_ops.stored_linear(x, **given, format_name=format_name, activations=activations)
    numbers = x.double()
    if activations is not None:
        round_ = ops.quantize_per_token if activations == "int8" else round_tokens
        numbers = torch.mul(*round_(x.float())).double()
    exact = numbers @ weight.dequantize().double().T + given["bias"].double()
    sizes = numbers.abs() @ weight.dequantize().double().abs().T + given["bias"].double().abs()
    assert (got.dtype, got.shape) == (dtype, (2, 3, 6))
    assert ((got.double() - exact).abs() <= (133 * EPS + 2 * torch.finfo(dtype).eps) * sizes).all()


def test_two_digits_mean_what_they_mean_in_panels() -> None:
    from fewbits.kernels.packing import pack_int8

    weight, given = arguments("int8", None)
    x = random(5, 128)
    packed = ops.int8_linear_two_digits(x, pack_int8(weight.codes), weight.scales.flatten(), given["bias"])
    got = stored_ops.stored_linear_two_digits(x, **given)
    assert torch.allclose(got, packed, rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize(("format_name", "group", "activations"), KINDS)
def test_the_schema_holds(format_name: str, group: int | None, activations: str | None) -> None:
    _, given = arguments(format_name, group)
    for x in (random(3, 128), random(2, 128).requires_grad_()):
        torch.library.opcheck(torch.ops.fewbits.stored_linear, (x, *given.values(), format_name, activations))


@pytest.mark.parametrize(("format_name", "group", "activations"), KINDS)
def test_the_gradient_is_that_of_the_float_layer(format_name: str, group: int | None, activations: str | None) -> None:
    weight, given = arguments(format_name, group)
    x = random(3, 128).requires_grad_()
    out = stored_ops.stored_linear(x, **given, format_name=format_name, activations=activations)
    (gradient,) = torch.autograd.grad(out, x, random(3, 6, seed=4))
    assert torch.allclose(gradient, random(3, 6, seed=4) @ weight.dequantize(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"x": torch.ones(2, 128, dtype=torch.int32)},
            r"x: float \[\.\.\., K\] is needed, got torch\.int32 \[2, 128\]",
        ),
        ({"x": torch.ones(2, 64)}, r"codes: int8 \[N, 64\] is needed for K = 64 in int8, got torch\.int8 \[6, 128\]"),
        ({"codes": torch.ones(6, 128)}, r"codes: int8 \[N, 128\] is needed .* got torch\.float32 \[6, 128\]; view"),
        ({"scales": torch.ones(6)}, r"scales: \[6, G\] is needed, .* got \[6\]; reshape"),
        ({"scales": torch.ones(6, 3)}, r"scales: \[6, G\] is needed, with a G that divides 128 bytes .* got \[6, 3\]"),
        ({"bias": torch.ones(5)}, r"bias: float32 \[6\] is needed"),
        ({"activations": "fp16"}, r"activations: 'fp16' is none that tokens are quantized to; int8, e4m3fn or None is"),
    ],
)
def test_messages(changes: dict[str, Any], message: str) -> None:
    _, given = arguments("int8", None)
    wrong = {"x": random(2, 128), **given, "format_name": "int8", "activations": "int8"} | changes
    with pytest.raises(FewbitsError, match=message):
        stored_ops.stored_linear(**wrong)


def test_two_digits_know_no_groups() -> None:
    _, given = arguments("int8", 32)
    with pytest.raises(FewbitsError, match=r"scales: \[6, 1\] is needed, got \[6, 4\]; two digits know no groups"):
        stored_ops.stored_linear_two_digits(random(2, 128), **given)
