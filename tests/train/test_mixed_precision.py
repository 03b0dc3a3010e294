"""Training by recipe: it learns, never steps on what is not finite, and goes on after a restart with the same bits."""

from __future__ import annotations

import copy
import dataclasses
import io
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fewbits
from fewbits import LossScaling, MixedPrecision, Recipe
from train.tiny_gpt import TinyGpt, batch, tiny_gpt

FP8 = Recipe.named("fp8")
RECIPES = {
    "fp32": Recipe.named("fp32"),
    "fp16": Recipe.named("fp16"),
    "bf16": Recipe.named("bf16"),
    "fp8": FP8,
    "fp8-delayed": dataclasses.replace(FP8, scaling="delayed"),
    "fp8-row": dataclasses.replace(FP8, scaling="row"),
    "fp8-block": dataclasses.replace(FP8, scaling="block"),
    "split": dataclasses.replace(Recipe.named("bf16"), master="split"),
    "split-bf16": dataclasses.replace(Recipe.named("bf16"), master="split", state="bf16"),
    "kahan": dataclasses.replace(Recipe.named("bf16"), master="kahan"),
    "stochastic-8bit": dataclasses.replace(Recipe.named("bf16"), master="stochastic", state="8bit"),
    "fp16-8bit": dataclasses.replace(Recipe.named("fp16"), state="8bit"),
}


def adamw(model: nn.Module, **options: Any) -> torch.optim.AdamW:
    return torch.optim.AdamW(model.parameters(), **{"lr": 3e-3, "weight_decay": 0.01} | options)


def prepared(recipe: str | Recipe, **options: Any) -> MixedPrecision:
    model = tiny_gpt()
    return MixedPrecision(model, adamw(model, **options), recipe)


def train(mp: MixedPrecision, first: int, last: int, micro_batches: int = 1) -> list[float]:
    losses = []
    for step in range(first, last):
        for micro in range(micro_batches):
            with mp.forward():
                loss = mp.model(batch(step * micro_batches + micro)) / micro_batches
            mp.backward(loss)
        losses.append(loss.item() * micro_batches)
        mp.step(max_grad_norm=1.0)
    return losses


def everything(mp: MixedPrecision) -> dict[str, Tensor]:
    state = mp.state_dict()
    named = dict(state["model"])
    for name, held in state["masters"].items():
        named |= {f"{name} {key}": torch.as_tensor(value) for key, value in held.items()}
    return {name: tensor.clone() for name, tensor in named.items()}


def assert_same(ours: dict[str, Tensor], its: dict[str, Tensor]) -> None:
    assert ours.keys() == its.keys()
    assert [name for name in ours if not torch.equal(ours[name], its[name])] == []


@pytest.fixture(scope="module")
def fp32_loss() -> float:
    return sum(train(prepared("fp32"), 0, 60)[-10:]) / 10


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
def test_every_recipe_learns_what_float32_learns(recipe: Recipe, fp32_loss: float) -> None:
    mp = prepared(recipe)
    losses = train(mp, 0, 60)
    assert losses[0] > 4
    assert fp32_loss < 3
    assert sum(losses[-10:]) / 10 == pytest.approx(fp32_loss, rel=0.03)


def test_fp32_is_plain_pytorch() -> None:
    mp, model = prepared("fp32"), tiny_gpt()
    optimizer = adamw(model)
    for step in range(5):
        model(batch(step)).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    train(mp, 0, 5)
    for ours, its in zip(mp.model.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(ours, its, rtol=1e-4, atol=2e-5)


def test_any_other_optimizer_steps_by_itself() -> None:
    model = tiny_gpt()
    mp = MixedPrecision(model, torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9), "fp16")
    losses = train(mp, 0, 40)
    assert losses[-1] < losses[0] - 1
    assert mp.optimizer.state


def test_the_sweep_and_the_optimizer_itself_agree() -> None:
    swept, model = prepared("fp16"), tiny_gpt()
    by_itself = MixedPrecision(model, adamw(model, maximize=False, capturable=False, amsgrad=True), "fp16")
    # amsgrad's first step is AdamW's.
    train(swept, 0, 1)
    train(by_itself, 0, 1)
    assert not swept.optimizer.state
    assert by_itself.optimizer.state
    for ours, its in zip(swept.model.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(ours, its, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("name", ["fp16", "bf16", "fp8", "split-bf16", "stochastic-8bit"])
def test_a_step_with_a_bad_gradient_changes_nothing_and_names_it(name: str, bad: float) -> None:
    mp = prepared(RECIPES[name])
    train(mp, 0, 3)
    before = everything(mp)
    with mp.forward():
        loss = mp.model(batch(3))
    mp.backward(loss)
    weight = mp.model.blocks[1].up.weight
    weight.grad[3, 5] = weight.grad[4, 5] = bad
    step = mp.step(max_grad_norm=1.0)
    assert step.skipped
    assert not math.isfinite(step.grad_norm)
    (culprit,) = step.culprits
    nan = math.isnan(bad)
    assert (culprit.name, culprit.infinite, culprit.nan) == ("blocks.1.up.weight", 0 if nan else 2, 2 if nan else 0)
    assert_same(everything(mp), before)
    assert all(param.grad is None for param in mp.model.parameters())
    assert (mp.loss_scale < step.loss_scale) == (name == "fp16" and not nan)
    assert not mp_step(mp, 4).skipped


def mp_step(mp: MixedPrecision, step: int) -> fewbits.train.mixed_precision.Step:
    with mp.forward():
        loss = mp.model(batch(step))
    mp.backward(loss)
    return mp.step()


def test_two_hundred_overflows_then_zeros_never_make_a_weight_bad() -> None:
    mp = prepared("fp16")
    before = everything(mp)
    for step in range(200):
        with mp.forward():
            loss = mp.model(batch(step))
        mp.backward(loss)
        mp.model.head.weight.grad.fill_(math.inf)
        assert mp.step().skipped
    assert_same(everything(mp), before)
    assert mp.loss_scale == 1.0
    for step in range(70):
        with mp.forward():
            loss = mp.model(batch(step)) * (0.0 if step < 5 else 1.0)  # gradients of exactly 0 at the least scale
        mp.backward(loss)
        assert not mp.step().skipped
    assert all(param.isfinite().all() for param in mp.model.parameters())
    assert mp.loss_scale >= 2.0**10


def test_a_real_overflow_in_fp16_is_found_and_the_scale_follows() -> None:
    mp = prepared(dataclasses.replace(Recipe.named("fp16"), loss_scaling=LossScaling(initial=2.0**24)))
    skipped = [mp_step(mp, step).skipped for step in range(30)]
    assert skipped[0]
    assert sum(skipped) < 10
    assert not any(skipped[-5:])


@pytest.mark.filterwarnings("ignore:recipe fp16. fp16 without loss scaling")
def test_fp16_without_loss_scaling_loses_gradients_that_scaling_keeps() -> None:
    lost = {}
    for name, rules in (("without", None), ("with", LossScaling())):
        mp = prepared(dataclasses.replace(Recipe.named("fp16"), loss_scaling=rules))
        with mp.forward():
            loss = mp.model(batch(0)) * 1e-5
        mp.backward(loss)
        gradient = mp.model.blocks[0].qkv.weight.grad
        lost[name] = (gradient == 0).float().mean().item()
    assert lost["without"] > 0.2
    assert lost["with"] < 0.01


@pytest.mark.parametrize("bad", [math.inf, math.nan])
def test_a_loss_that_is_not_finite_skips_the_step_and_leaves_the_scale(bad: float) -> None:
    mp = prepared("fp16")
    before = everything(mp)
    with mp.forward():
        loss = mp.model(batch(0)) * bad
    mp.backward(loss)
    step = mp.step()
    assert step.skipped
    assert step.culprits[0].name == "loss"
    assert mp.loss_scale == 2.0**16
    assert_same(everything(mp), before)


@pytest.mark.parametrize("recipe", ["fp16", "bf16"])
def test_micro_batches_add_up_in_float32(recipe: str) -> None:
    mp, single = prepared(recipe), prepared(recipe)
    expected: dict[str, Tensor] = {}
    for micro in range(3):
        with single.forward():
            loss = single.model(batch(micro))
        single.backward(loss)
        for name, param in single.model.named_parameters():
            expected[name] = expected.get(name, 0) + param.grad.float()
            param.grad = None
        with mp.forward():
            loss = mp.model(batch(micro))
        mp.backward(loss)
    for name, param in mp.model.named_parameters():
        assert param.grad.dtype == torch.float32
        torch.testing.assert_close(param.grad, expected[name], rtol=1e-6, atol=0)


def test_one_pass_keeps_gradients_as_narrow_as_the_matmuls_gave_them() -> None:
    mp = prepared("bf16")
    with mp.forward():
        loss = mp.model(batch(0))
    mp.backward(loss)
    assert mp.model.blocks[0].up.weight.grad.dtype == torch.bfloat16
    assert mp.model.norm.weight.grad.dtype == torch.float32


@pytest.mark.parametrize("recipe", ["fp16", "bf16", "fp8"])
def test_weights_are_rounded_once_a_step(recipe: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from fewbits.train.matmul import Operands

    rounded: list[str] = []
    original = Operands._round

    def noted(self: Operands, x: Tensor, fmt: Any, key: str, square: bool) -> Tensor:
        if key.endswith("weight"):
            rounded.append(key)
        return original(self, x, fmt, key, square)

    monkeypatch.setattr(Operands, "_round", noted)
    mp = prepared(recipe)
    train(mp, 0, 1, micro_batches=3)
    assert len(rounded) == len(set(rounded)) == 9  # four layers in each of two blocks, and the head
    train(mp, 1, 2, micro_batches=3)
    assert len(rounded) == (18 if recipe == "fp8" else 9)  # the sweep writes the copies of 16 bits


@pytest.mark.parametrize("recipe", ["fp16", "bf16"])
def test_the_copies_that_the_sweep_writes_are_the_rounded_weights(recipe: str) -> None:
    mp = prepared(recipe)
    train(mp, 0, 3)
    weight = mp.model.blocks[0].down.weight
    copied = mp.policy.operands.copy_of(weight)
    assert copied is not None
    assert torch.equal(copied, weight.detach().to(copied.dtype))


def test_weights_changed_by_hand_are_seen() -> None:
    mp = prepared("bf16")
    train(mp, 0, 1)
    with torch.no_grad():
        mp.model.tokens.weight.zero_()
    with mp.forward():
        assert mp.model(batch(0)).item() == pytest.approx(math.log(67), abs=1e-4)


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
def test_a_resumed_run_has_the_same_bits(recipe: Recipe) -> None:
    whole = prepared(recipe)
    train(whole, 0, 5)
    file = io.BytesIO()
    torch.save(whole.state_dict(), file)
    train(whole, 5, 9, micro_batches=2)
    file.seek(0)
    torch.manual_seed(9)
    model = TinyGpt()
    resumed = MixedPrecision(model, adamw(model), recipe)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    train(resumed, 5, 9, micro_batches=2)
    assert_same(everything(resumed), everything(whole))
    assert resumed.state_dict()["loss_scale"] == whole.state_dict()["loss_scale"]
    assert resumed.optimizer.state_dict()["param_groups"] == whole.optimizer.state_dict()["param_groups"]


def test_learning_rates_of_a_scheduler_are_obeyed_and_it_does_not_warn() -> None:
    mp = prepared("bf16")
    scheduler = torch.optim.lr_scheduler.LambdaLR(mp.optimizer, lambda step: float(step == 0))
    mp_step(mp, 0)
    scheduler.step()
    before = everything(mp)
    mp_step(mp, 1)
    after = everything(mp)
    assert torch.equal(after["head.weight"], before["head.weight"])
    assert not torch.equal(after["tokens.weight m"], before["tokens.weight m"])


def test_learning_rates_are_obeyed_after_a_state_dict_was_loaded() -> None:
    mp = prepared("bf16")
    mp.load_state_dict(mp.state_dict())  # PyTorch's optimizers replace their groups then
    before = {name: param.clone() for name, param in mp.model.named_parameters()}
    mp.optimizer.param_groups[0]["lr"] = 0.0
    train(mp, 0, 1)
    assert all(torch.equal(param, before[name]) for name, param in mp.model.named_parameters())


def test_moments_that_the_optimizer_already_has_are_taken_over() -> None:
    model = tiny_gpt()
    optimizer = adamw(model)
    model(batch(0)).backward()
    optimizer.step()
    optimizer.zero_grad()
    expected = copy.deepcopy(optimizer.state[model.norm.weight])
    mp = MixedPrecision(model, optimizer, "bf16")
    held = mp.state_dict()["masters"]["norm.weight"]
    assert held["steps"] == 1
    assert torch.equal(held["m"], expected["exp_avg"])


def test_frozen_and_unused_parameters_are_left_alone() -> None:
    model = tiny_gpt()
    model.places.weight.requires_grad_(False)
    model.register_parameter("unused", nn.Parameter(torch.ones(3)))
    mp = MixedPrecision(model, adamw(model), "fp16")
    frozen = model.places.weight.clone()
    train(mp, 0, 2)
    assert torch.equal(model.places.weight, frozen)
    assert torch.equal(model.unused, torch.ones(3))


def test_layers_to_keep_run_in_the_format_kept() -> None:
    seen: dict[str, torch.dtype] = {}
    model = tiny_gpt()
    for name in ("head", "blocks.0.up", "blocks.1.up"):
        model.get_submodule(name).register_forward_hook(
            lambda module, inputs, output, name=name: seen.__setitem__(name, output.dtype)
        )
    recipe = dataclasses.replace(Recipe.named("bf16"), keep=("head", "blocks.0.*"))
    train(MixedPrecision(model, adamw(model), recipe), 0, 1)
    assert seen == {"head": torch.float32, "blocks.0.up": torch.float32, "blocks.1.up": torch.bfloat16}


def test_checkpointed_activations_are_computed_again_by_the_same_recipe() -> None:
    from torch.utils.checkpoint import checkpoint

    gradients = []
    for recompute in (False, True):
        mp = prepared("fp16")
        block = mp.model.blocks[0]
        x = torch.randn(2, 16, 64, generator=torch.Generator().manual_seed(0))
        with mp.forward():
            out = checkpoint(block, x, use_reentrant=False) if recompute else block(x)
            loss = out.float().square().mean()
        mp.backward(loss)
        gradients.append(block.up.weight.grad)
    assert torch.equal(gradients[0], gradients[1])


@pytest.mark.parametrize(
    ("recipe", "fewest", "most"),
    [
        ("fp32", 16, 16.3),
        ("bf16", 16, 16.4),
        ("split", 14, 14.3),
        ("split-bf16", 10, 10.4),
        ("stochastic-8bit", 6, 6.5),
    ],
)
def test_bytes_per_parameter(recipe: str, fewest: float, most: float) -> None:
    """Weights, copies, gradients and state of a model of large matrices, counted in tensors."""
    model = nn.Sequential(*(nn.Linear(256, 256, bias=False) for _ in range(3)))
    mp = MixedPrecision(model, adamw(model), RECIPES[recipe])
    for _ in range(2):
        with mp.forward():
            loss = model(torch.randn(4, 256)).float().square().sum()
        mp.backward(loss)
        held = [*model.parameters(), *(param.grad for param in model.parameters())]
        held += [tensor for storage in mp._updater.storages.values() for tensor in storage.tensors().values()]
        held += [entry[2] for entry in mp.policy.operands._weights.values()]
        mp.step()
    total = sum(tensor.nbytes for tensor in held) / sum(param.numel() for param in model.parameters())
    assert fewest <= total <= most
