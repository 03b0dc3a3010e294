"""Known-bad combinations warn with the reason and the remedy, and really are bad; good ones are silent."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import pytest
import torch
from torch import nn

from fewbits import LossScaling, MixedPrecision, PrecisionWarning, Recipe
from train.tiny_gpt import batch, tiny_gpt

BF16 = Recipe.named("bf16")
KAHAN, SPLIT = (dataclasses.replace(BF16, master=master) for master in ("kahan", "split"))
UNSCALED = dataclasses.replace(Recipe.named("fp16"), loss_scaling=None)


def prepared(recipe: str | Recipe, optimizer: type = torch.optim.AdamW, **options: Any) -> MixedPrecision:
    model = tiny_gpt()
    return MixedPrecision(model, optimizer(model.parameters(), **options), recipe)


def warned(message: str) -> Any:
    return pytest.warns(PrecisionWarning, match=re.escape(message))


GOOD = {
    **{name: (Recipe.named(name), {}) for name in ("fp32", "fp16", "bf16", "fp8")},
    "bf16 moments and a long average": (dataclasses.replace(BF16, state="bf16"), {"betas": (0.9, 0.999)}),
    "8-bit moments and a long average": (dataclasses.replace(BF16, state="8bit"), {"betas": (0.9, 0.999)}),
    "split and little decay": (SPLIT, {"lr": 1e-6, "weight_decay": 1e-3}),
    "stochastic and little decay": (
        dataclasses.replace(BF16, master="stochastic"), {"lr": 1e-6, "weight_decay": 1e-3},
    ),
    "kahan and usual rates": (KAHAN, {"lr": 1e-4, "weight_decay": 0.1}),
    "kahan without decay": (KAHAN, {"lr": 1e-5, "weight_decay": 0.0}),
    "fp16 with a scale that stays": (
        dataclasses.replace(UNSCALED, loss_scaling=LossScaling(dynamic=False, initial=1024)), {},
    ),
    "kept layers in fp16, scaled": (
        dataclasses.replace(BF16, keep=("head",), kept="fp16", loss_scaling=LossScaling()), {},
    ),
    "a small eps": (BF16, {"eps": 1e-30}),
}  # fmt: skip


@pytest.mark.parametrize("name", GOOD)
def test_good_combinations_are_silent(name: str) -> None:  # warnings are errors here
    recipe, options = GOOD[name]
    mp = prepared(recipe, **options)
    with mp.forward():
        loss = mp.model(batch(0))
    mp.backward(loss)
    assert not mp.step().skipped


@pytest.mark.parametrize("scaling", [None, LossScaling(dynamic=False, initial=1)])
def test_fp16_without_loss_scaling(scaling: LossScaling | None) -> None:
    recipe = dataclasses.replace(UNSCALED, loss_scaling=scaling)
    with warned("recipe fp16: fp16 without loss scaling: gradients below 2^-24 become zero; take loss_scaling=Loss"):
        mp = prepared(recipe)
    zeros = []
    for each in (mp, prepared("fp16")):
        with each.forward():
            loss = each.model(batch(0)) * 2.0**-16  # as from a mean over more tokens
        each.backward(loss)
        zeros.append(sum(int((param.grad == 0).sum()) for param in each.model.parameters()))
    assert zeros[0] > 2 * zeros[1]


def test_kept_layers_in_fp16_without_loss_scaling() -> None:
    with warned("recipe bf16: kept='fp16' without loss scaling: gradients of the kept layers below 2^-24 become zero"):
        prepared(dataclasses.replace(BF16, keep=("head",), kept="fp16"))


@pytest.mark.parametrize("optimizer", [torch.optim.AdamW, torch.optim.RMSprop, torch.optim.Adagrad])
def test_eps_that_is_zero_in_float32(optimizer: type) -> None:
    model = nn.Embedding(4, 8)
    with warned("recipe bf16: eps=1e-50 is 0 in float32, where the update is computed: a weight whose gradients are "):
        mp = MixedPrecision(model, optimizer(model.parameters(), eps=1e-50))
    with mp.forward():
        loss = model(torch.tensor([1])).sum()
    mp.backward(loss)
    mp.step()
    assert model.weight[0].isnan().all()  # which is what it warns of
    assert model.weight[1].isfinite().all()


def changed(recipe: Recipe, lr: float, decay: float, gradient: float) -> float:
    """The mean relative change of a weight of ones in 3000 steps."""
    model = nn.Linear(64, 64, bias=False)
    nn.init.ones_(model.weight)
    mp = MixedPrecision(model, torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=decay), recipe)
    for _ in range(3000):
        with mp.forward():
            loss = model.weight.sum() * gradient
        mp.backward(loss)
        mp.step()
    master = next(iter(mp._updater.storages.values())).master_value()  # type: ignore[attr-defined]
    return float(1 - master.mean())


def test_weight_decay_that_kahan_masters_lose() -> None:
    with warned("recipe bf16: lr · weight_decay = 3e-06 is below 2^-18: kahan masters lose the decay, all of it where"):
        assert changed(KAHAN, 3e-4, 0.01, 0.0) == 0
    assert changed(SPLIT, 3e-4, 0.01, 0.0) == pytest.approx(3000 * 3e-6, rel=0.02)


def test_updates_that_kahan_masters_lose() -> None:
    with warned("recipe bf16: lr=3e-06 is below 2^-18 of weights of typical size 1: kahan masters lose updates of th"):
        assert changed(KAHAN, 3e-6, 0.0, 1.0) == 0
    assert changed(SPLIT, 3e-6, 0.0, 1.0) == pytest.approx(3000 * 3e-6, rel=0.02)


def test_a_rate_that_a_schedule_has_begun_with_is_not_the_rate() -> None:
    model = tiny_gpt()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.1)
    torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: step / 1e6 + 1e-6)
    assert optimizer.param_groups[0]["lr"] < 1e-8
    MixedPrecision(model, optimizer, KAHAN)


def test_autocast_around_the_forward_pass() -> None:
    mp = prepared("bf16")
    with (
        torch.autocast("cpu", torch.bfloat16),
        warned("torch.autocast is on for cpu: it casts again what the recipe"),
        mp.forward(),
    ):
        mp.model(batch(0))


def test_accelerate_that_casts_or_scales_too() -> None:
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    def prepared_by(accelerator: Accelerator) -> MixedPrecision:
        model = tiny_gpt()
        model, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters()))
        return MixedPrecision(model, optimizer, "bf16")

    try:
        prepared_by(Accelerator(cpu=True, mixed_precision="no"))
        AcceleratorState._reset_state(reset_partial_state=True)
        with warned("recipe bf16: the model's forward is wrapped by accelerate's mixed precision, which casts again"):
            prepared_by(Accelerator(cpu=True, mixed_precision="bf16"))
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)


def test_an_optimizer_with_a_scaler_of_its_own() -> None:
    class Scaling(torch.optim.SGD):  # as accelerate's
        scaler = torch.amp.GradScaler("cpu")

    with warned(
        "recipe bf16: the optimizer has a GradScaler of its own: gradients would be unscaled twice; take Accel"
    ):
        prepared("bf16", Scaling)
