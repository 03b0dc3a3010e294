"""8-bit operands through ``torch._scaled_mm``, whose CPU version stands for a GPU's: the numbers of the emulation."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

from fewbits import Recipe
from fewbits.train import fp8_product
from fewbits.train.matmul import Operands, linear
from fewbits.train.scaling import AmaxHistory


@pytest.fixture
def products(monkeypatch: pytest.MonkeyPatch) -> list[tuple[torch.dtype, torch.dtype]]:
    """The formats of all products that went through ``_scaled_mm``, on a CPU that says that it has FP8."""
    seen: list[tuple[torch.dtype, torch.dtype]] = []
    real: Any = torch._scaled_mm

    def watched(a: Tensor, b: Tensor, *rest: Any, **options: Any) -> Tensor:
        seen.append((a.dtype, b.dtype))
        assert a.is_contiguous()
        assert b.t().is_contiguous()
        result: Tensor = real(a, b, *rest, **options)
        return result

    monkeypatch.setattr(fp8_product, "has_fp8", lambda device, by_row: True)
    monkeypatch.setattr(torch, "_scaled_mm", watched)
    return seen


def ran(recipe: Recipe, tokens: int = 32) -> tuple[Tensor, ...]:
    """The result of a linear layer, and the gradients of its input, weight and bias, after two steps."""
    generator = torch.Generator().manual_seed(0)
    x, weight, bias = (
        torch.randn(*shape, generator=generator).requires_grad_() for shape in ((tokens, 64), (48, 64), (48,))
    )
    operands = Operands(recipe, AmaxHistory(recipe.history))
    found: list[Tensor] = []
    for size in (3.0, 1.0):  # the delayed scale of the second is that of the first
        found = [linear(x * size, weight, bias, operands, "layer")]
        found += torch.autograd.grad(found[0].float().square().sum(), (x, weight, bias))
        operands.history.end_step(keep=True)
    return tuple(found)


@pytest.mark.parametrize(
    ("scaling", "results"),
    [("tensor", "bf16"), ("tensor", "fp32"), ("delayed", "bf16"), ("delayed", "fp32"), ("row", "bf16")],
)
def test_products_are_those_of_the_emulation(
    products: list[Any], monkeypatch: pytest.MonkeyPatch, scaling: str, results: str
) -> None:
    recipe = dataclasses.replace(Recipe.named("fp8"), scaling=scaling, results=results)
    ours = ran(recipe)
    e4m3, e5m2 = torch.float8_e4m3fn, torch.float8_e5m2
    assert products == [(e4m3, e4m3), (e5m2, e4m3), (e5m2, e4m3)] * 2
    monkeypatch.setattr(fp8_product, "has_fp8", lambda device, by_row: False)
    for mine, theirs in zip(ours, ran(recipe), strict=True):
        assert mine.dtype == theirs.dtype
        # Another order of sums flips a rounding to bf16 at times, and what comes after it.
        torch.testing.assert_close(mine, theirs, rtol=2**-7 if results == "bf16" else 1e-5, atol=2e-3)
    assert len(products) == 6


@pytest.mark.parametrize("scaling", ["tensor", "delayed", "row"])
@pytest.mark.parametrize("name", ["e4m3fn", "e5m2"])
def test_codes_lose_no_bit(scaling: str, name: str) -> None:
    recipe = dataclasses.replace(Recipe.named("fp8"), scaling=scaling, activations=name)
    operands = Operands(recipe, AmaxHistory(4))
    x = torch.randn(64, 64, generator=torch.Generator().manual_seed(1)) * torch.logspace(-30, 3, 64)[:, None]
    x[5] = 0
    for size in (1e3, 1.0, 1e-3):
        rounded = operands.activation(x * size, "layer")
        operands.history.end_step(keep=True)
        kind = "row" if scaling == "row" else "tensor"
        codes, scale = fp8_product._codes(rounded, recipe.activations, kind)
        assert torch.equal(codes.float() * scale, rounded.float())


def test_what_is_not_finite_stays_visible(products: list[Any]) -> None:
    operands = Operands(Recipe.named("fp8"), AmaxHistory(4))
    x = torch.ones(16, 16)
    x[3, 4] = torch.inf
    assert bool(linear(x, torch.ones(16, 16), None, operands, "layer").isnan().all())
    assert len(products) == 1


def test_shapes_and_recipes_that_no_unit_takes(products: list[Any]) -> None:
    ran(Recipe.named("fp8"), tokens=31)  # the sums of the weight's gradient run over 31 tokens
    assert len(products) == 4
    ran(dataclasses.replace(Recipe.named("fp8"), scaling="block"))
    ran(Recipe.named("bf16"))
    assert len(products) == 4
    ran(dataclasses.replace(Recipe.named("fp8"), activations="e5m2", weights="e5m2"))
    assert len(products) == 4
