"""Matmuls by recipe: what they compute, against exact arithmetic, and which operations the policy widens."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import fewbits
from fewbits import MixedPrecision, Recipe
from fewbits.formats import Format
from fewbits.train.matmul import product
from fewbits.train.scaling import BLOCK, AmaxHistory, amax_of, scaled_round

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}
FP8 = Recipe.named("fp8")
SCALINGS = ["tensor", "row", "block"]


def layer(recipe: str | Recipe, K: int = 200, N: int = 150, bias: bool = True) -> tuple[nn.Linear, MixedPrecision]:
    torch.manual_seed(0)
    model = nn.Linear(K, N, bias=bias)
    return model, MixedPrecision(model, torch.optim.AdamW(model.parameters()), recipe)


def assert_within_one_rounding(ours: Tensor, exact: Tensor, terms: Tensor) -> None:
    """Equal to the exact sum rounded once, or beside it where the order of the sum decides.

    A float32 sum of K terms is off by at most K · 2^-24 of the sum of magnitudes; then half an ulp of the result.
    """
    eps = torch.finfo(ours.dtype).eps
    slack = 200 * 2.0**-24 * terms + (exact.abs() * eps / 2).clamp(min=torch.finfo(ours.dtype).smallest_normal * eps)
    assert ((ours.double() - exact).abs() <= slack * 1.001).all()
    assert (ours == exact.to(ours.dtype)).double().mean() > 0.98


@pytest.mark.parametrize("name", ["fp16", "bf16"])
def test_a_linear_layer_and_its_gradients_are_rounded_once(name: str) -> None:
    model, mp = layer(name)
    dtype = DTYPES[name]
    x = torch.randn(7, 5, 200, requires_grad=True)
    with mp.forward():
        y = model(x)
        assert y.dtype == dtype
        loss = (y.float() * torch.linspace(-1, 1, 150)).sum() * 2**-12  # times the scale of fp16, no overflow
    g = torch.linspace(-1, 1, 150).to(dtype).double().expand(35, 150)
    scaled = g * 2**-12 * mp.loss_scale
    mp.backward(loss)
    a, w = x.detach().reshape(35, 200).to(dtype).double(), model.weight.detach().to(dtype).double()
    bias = model.bias.detach().to(dtype).double()
    assert_within_one_rounding(y.detach().reshape(35, 150), a @ w.t() + bias, a.abs() @ w.abs().t())
    assert model.weight.grad.dtype == dtype
    assert_within_one_rounding(model.weight.grad, scaled.t() @ a, scaled.abs().t() @ a.abs())
    assert x.grad.dtype == torch.float32
    assert_within_one_rounding(x.grad.reshape(35, 200).to(dtype), scaled @ w, scaled.abs() @ w.abs())
    torch.testing.assert_close(model.bias.grad, scaled.sum(0).float())


@pytest.mark.parametrize("shape", [(40, 60, 900), (900, 60, 40), (40, 900, 60), (60, 60, 60)])
@pytest.mark.parametrize("with_bias", [False, True])
def test_large_operands_are_widened_slice_by_slice(
    shape: tuple[int, int, int], with_bias: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    M, K, N = shape
    torch.manual_seed(0)
    a, b = torch.randn(M, K).half(), torch.randn(K, N).half()
    bias = torch.randn(N).half() if with_bias else None
    whole = product(a, b, torch.float16, bias)
    monkeypatch.setattr("fewbits.train.matmul._SLICE", 4000)
    exact = a.double() @ b.double() + (0 if bias is None else bias.double())
    ours = product(a, b, torch.float16, bias)
    assert_within_one_rounding(ours, exact, 5 * a.double().abs() @ b.double().abs())
    assert (ours == whole).double().mean() > 0.98


@pytest.mark.parametrize("scaling", SCALINGS)
@pytest.mark.parametrize("fmt", ["e4m3fn", "e5m2"])
@pytest.mark.parametrize("square", [False, True])
def test_eight_bit_operands_are_values_times_powers_of_two(scaling: str, fmt: str, square: bool) -> None:
    torch.manual_seed(0)
    x = torch.randn(300, 200) * torch.logspace(-8, 8, 200)
    amax = amax_of(x, scaling, square)
    rounded = scaled_round(x, Format.named(fmt), amax, square)
    size = {"tensor": (300, 200), "row": (1, 200), "block": (BLOCK if square else 1, BLOCK)}[scaling]
    for r in range(0, 300, size[0]):
        for c in range(0, 200, size[1]):
            part = x[r : r + size[0], c : c + size[1]].double()
            k = torch.floor(torch.log2(float(Format.named(fmt).max) / part.abs().max()))
            expected = fewbits.round_to(part * 2**k, fmt, overflow="saturate") * 2**-k
            assert torch.equal(rounded[r : r + size[0], c : c + size[1]].double(), expected)


@pytest.mark.parametrize("scaling", [*SCALINGS, "delayed"])
def test_an_fp8_layer_is_near_the_exact_one_and_its_gradients_too(scaling: str) -> None:
    model, mp = layer(dataclasses.replace(FP8, scaling=scaling), K=320, N=288)
    x = torch.randn(160, 320, requires_grad=True)
    target = torch.randn(160, 288, generator=torch.Generator().manual_seed(1))
    with mp.forward():
        y = model(x)
        loss = (y.float() * target).sum()
    mp.backward(loss)
    exact = nn.Linear(320, 288)
    exact.load_state_dict(model.state_dict())
    x_exact = x.detach().clone().requires_grad_()
    expected = exact(x_exact)
    (expected * target).sum().backward()
    for ours, its, most in (
        (y, expected, 0.05),
        (x.grad, x_exact.grad, 0.09),
        (model.weight.grad, exact.weight.grad, 0.09),
    ):
        error = ((ours.float() - its).norm() / its.norm()).item()
        assert 0.01 < error < most, "rounded to 8 bits, and no more"


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
@pytest.mark.parametrize("scaling", [*SCALINGS, "delayed"])
def test_an_operand_that_is_not_finite_is_never_saturated_away(scaling: str, bad: float) -> None:
    model, mp = layer(dataclasses.replace(FP8, scaling=scaling))
    x = torch.randn(9, 200)
    with mp.forward():
        model(x)
        mp.policy.history.end_step(keep=True)
        x[3, 7] = bad
        assert model(x)[3].isnan().any()


def test_zeros_have_a_scale_too() -> None:
    model, mp = layer("fp8", bias=False)
    with mp.forward():
        assert torch.equal(model(torch.zeros(3, 200)), torch.zeros(3, 150, dtype=torch.bfloat16))


def test_delayed_scales_come_from_the_past_and_forget_it() -> None:
    history = AmaxHistory(2)
    seen = []
    for amax in (1.0, 5.0, 2.0, 3.0, 4.0):
        seen.append(history.scale_amax("x", torch.tensor(amax)).item())
        history.end_step(keep=True)
    assert seen == [1.0, 1.0, 5.0, 5.0, 3.0]
    history.scale_amax("x", torch.tensor(100.0))
    history.end_step(keep=False)
    assert history.scale_amax("x", torch.tensor(1.0)).item() == 4.0


X = torch.linspace(0.1, 0.9, 32).view(4, 8)
NARROW_IN = {
    "matmul": lambda x: x @ x.t(),
    "bmm": lambda x: torch.bmm(x[None], x.t()[None]),
    "einsum": lambda x: torch.einsum("ij,kj->ik", x, x),
    "conv1d": lambda x: functional.conv1d(x[None], torch.ones(2, 4, 3)),
    "attention": lambda x: functional.scaled_dot_product_attention(x[None, None], x[None, None], x[None, None]),
    "functional linear": lambda x: functional.linear(x, torch.ones(3, 8)),
}
WIDE_OUT = {
    "softmax": lambda x: x.softmax(-1),
    "log_softmax": lambda x: functional.log_softmax(x, -1),
    "layer_norm": lambda x: functional.layer_norm(x, (8,)),
    "rms_norm": lambda x: functional.rms_norm(x, (8,)),
    "sum": lambda x: x.sum(),
    "mean": lambda x: torch.mean(x),
    "exp": lambda x: x.exp(),
    "log": torch.log,
    "pow": lambda x: x**2,
    "norm": lambda x: torch.linalg.vector_norm(x),
    "mse": lambda x: functional.mse_loss(x, x),
    "cross_entropy": lambda x: functional.cross_entropy(x, torch.tensor([0, 1, 2, 3])),
}


@pytest.mark.parametrize("name", ["fp16", "bf16"])
@pytest.mark.parametrize("operation", NARROW_IN)
def test_matmuls_of_any_kind_give_the_recipes_format(operation: str, name: str) -> None:
    _, mp = layer(name)
    function = NARROW_IN[operation]
    with mp.forward():
        ours = function(X)
    assert ours.dtype == DTYPES[name]
    torch.testing.assert_close(ours.float(), function(X), rtol=4 * torch.finfo(ours.dtype).eps, atol=1e-3)


@pytest.mark.parametrize("name", ["fp16", "bf16"])
@pytest.mark.parametrize("operation", WIDE_OUT)
def test_sums_norms_and_losses_are_in_float32(operation: str, name: str) -> None:
    _, mp = layer(name)
    narrow, function = X.to(DTYPES[name]), WIDE_OUT[operation]
    with mp.forward():
        ours = function(narrow)
    assert ours.dtype == torch.float32
    assert torch.equal(ours, function(narrow.float()))


def test_gradients_of_matmuls_between_activations_are_rounded_too() -> None:
    _, mp = layer("fp16")
    a, b = torch.randn(6, 40, requires_grad=True), torch.randn(40, 5, requires_grad=True)
    with mp.forward():
        loss = (a @ b).float().sum()
    loss.backward()
    expected = torch.ones(6, 5, dtype=torch.float64) @ b.detach().half().double().t()
    assert torch.equal(a.grad, a.grad.half().float())
    assert_within_one_rounding(a.grad.half(), expected, expected.abs() + 1)


def test_a_mask_of_the_least_float32_masks_in_fp16() -> None:
    _, mp = layer("fp16")
    mask = torch.zeros(4, 4)
    mask[1] = torch.finfo(torch.float32).min
    mask[2, 1] = float("-inf")
    x = X[None, None]
    with mp.forward():
        ours = functional.scaled_dot_product_attention(x, x, x, attn_mask=mask)
    assert ours.isfinite().all()


def test_after_the_context_nothing_is_changed() -> None:
    model, mp = layer("fp16")
    with pytest.raises(ZeroDivisionError), mp.forward():
        raise ZeroDivisionError
    assert model(torch.randn(2, 200)).dtype == torch.float32
    with mp.forward():
        assert model(torch.randn(2, 200)).dtype == torch.float16
