"""Preflight: what is predicted from float32 is what a run in the lower precision then counts, layer by layer."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fewbits import FewbitsError, LossScaling, MixedPrecision, Recipe
from fewbits.train.preflight import Preflight, preflight
from fewbits.train.preflight_counter import OperandCounter, Tally
from train.tiny_gpt import batch, tiny_gpt

pytestmark = pytest.mark.filterwarnings("ignore:recipe fp16. fp16 without loss scaling")  # that is what is looked at

FEWEST = 1000
"""Counts from which fractions are compared: of n independent counts chance alone moves 1/√n, 3 % of 1000."""
WITHIN = 0.10


def fixed(recipe: str | Recipe, scale: float) -> Recipe:
    return dataclasses.replace(Recipe.named(recipe), loss_scaling=LossScaling(initial=scale, dynamic=False))


def counted(model: nn.Module, batches: Iterable[Any], recipe: Recipe, lr: float = 1e-5) -> OperandCounter:
    """A real run in mixed precision: its weights move."""
    mp = MixedPrecision(model, torch.optim.AdamW(model.parameters(), lr=lr), recipe)
    counter = OperandCounter()
    mp.policy.observe(counter)
    with counter.watching(model):
        for one in batches:
            with mp.forward():
                loss = model(one) if isinstance(one, Tensor) else model(**one).loss
            mp.backward(loss)
            mp.step()
    mp.policy.observe(None)
    return counter


def pairs(told: Preflight, counter: OperandCounter) -> list[tuple[str, float, float]]:
    """Of each layer and fate with enough counts: its name, the predicted and the counted fraction."""
    found = []
    for row in told.rows:
        tally = counter.tallies.get((row.module, row.kind))
        if tally is None or not tally.values:
            assert row.kind == "weight_gradient", f"{row.module} {row.kind} was predicted and never read"
            continue
        for fate, share in counted_fractions(row.format, tally, row.zeros / row.values).items():
            predicted = getattr(row.predicted, fate)
            if max(predicted, share) * tally.values >= FEWEST:
                found.append((f"{row.module} {row.kind} {fate}", predicted, share))
    return found


def counted_fractions(fmt: str, tally: Tally, zeros: float) -> dict[str, float]:
    """Zeros of a 16-bit operand may be as old as the operation before: those that float32 has too are taken off."""
    new = tally.zeroed / tally.values if fmt in ("e4m3fn", "e5m2") else tally.zeros / tally.values - zeros
    return {"zeroed": new, "subnormal": tally.subnormal / tally.values, "saturated": tally.saturated / tally.values}


def apart(found: list[tuple[str, float, float]]) -> list[tuple[str, float, float]]:
    return [row for row in found if abs(row[1] - row[2]) > WITHIN * row[2]]


class Shrinking(nn.Module):
    """Linear layers whose activations and gradients get so small, or large, that a lower precision loses them."""

    def __init__(self, factor: float, width: int = 256) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.third = (nn.Linear(width, width, bias=False) for _ in range(3))
        with torch.no_grad():
            self.second.weight.mul_(factor)

    def forward(self, x: Tensor) -> Tensor:
        return self.third(self.second(self.first(x).tanh())).square().mean()


def inputs(count: int, size: int = 256) -> list[Tensor]:
    generator = torch.Generator().manual_seed(7)
    return [torch.randn(64, size, generator=generator) for _ in range(count)]


@pytest.mark.parametrize("scale", [1.0, 2.0**6])
def test_predicted_is_counted_in_fp16(scale: float) -> None:
    """Gradients and activations near 2^-24: zeros and subnormals by the thousand."""
    recipe, batches = fixed("fp16", scale), inputs(6)
    told = preflight(Shrinking(2.0**-6), batches, recipe)
    found = pairs(told, counted(Shrinking(2.0**-6), batches, recipe))
    assert {"first gradient zeroed", "second weight subnormal"} <= {name for name, *_ in found}
    assert len(found) >= 4
    assert apart(found) == []


def test_predicted_is_counted_where_fp16_overflows() -> None:
    recipe, batches = fixed("fp16", 1.0), inputs(4)
    told = preflight(Shrinking(2.0**18), batches, recipe)
    found = pairs(told, counted(Shrinking(2.0**18), batches, recipe))
    assert "second weight saturated" not in [name for name, *_ in found]
    assert "third activation saturated" in [name for name, *_ in found]
    assert apart([row for row in found if "gradient" not in row[0]]) == []  # the loss is Inf
    assert told.keep[0].pattern is not None


@pytest.mark.parametrize("scaling", ["tensor", "row", "block", "delayed"])
def test_predicted_is_counted_in_fp8(scaling: str) -> None:
    """Wide distributions: a scale that fits the largest leaves the small ones below 2^-9."""
    recipe = dataclasses.replace(Recipe.named("fp8"), scaling=scaling, history=2)
    spread = torch.empty(256).uniform_(-14, 0, generator=torch.Generator().manual_seed(3)).exp2()
    batches = [x * spread[torch.randperm(256, generator=torch.Generator().manual_seed(k))]
               for k, x in enumerate(inputs(6))]  # fmt: skip
    told = preflight(Shrinking(1.0), batches, recipe)
    found = pairs(told, counted(Shrinking(1.0), batches, recipe))
    assert "first activation subnormal" in [name for name, *_ in found]
    assert ("first activation zeroed" in [name for name, *_ in found]) == (scaling in ("tensor", "delayed"))
    assert apart(found) == []


def test_a_scale_near_a_power_of_two_is_that_of_the_run() -> None:
    """448 is 1.75 · 2^8: the second layer's input is 1.84 in float32, and 1.75 where the first weight has 8 bits."""
    model = nn.Sequential(nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False), Loss())
    with torch.no_grad():
        model[0].weight.fill_(1.05)
    batches = [torch.tensor([[1.75]])]
    told = preflight(model, batches, "fp8")
    counter = counted(model, batches, Recipe.named("fp8"), lr=0.0)
    (row,) = (row for row in told.rows if (row.module, row.kind) == ("1", "activation"))
    assert row.exponents == {0: 1}
    assert row.seen == {8: 1}
    assert counter.tallies["1", "activation"].scales == {8: 1}


def test_the_noise_of_a_gradient_that_is_zero_is_not_counted() -> None:
    """Tokens whose gradients are below 2^-24 of the largest: what float32 sums leave where the exact one is zero."""
    factors = torch.ones(64, 1)
    factors[3] = 2.0**-25 * 2.0**-8
    factors[4:8] = 2.0**-20

    class Weighed(Shrinking):
        def forward(self, x: Tensor) -> Tensor:
            return (self.third(self.second(self.first(x).tanh())) * factors).sum()

    told = preflight(Weighed(1.0), inputs(1), "fp8")
    counter = counted(Weighed(1.0), inputs(1), Recipe.named("fp8"))
    (row,) = (row for row in told.rows if (row.module, row.kind) == ("third", "gradient"))
    assert row.predicted.zeroed == 0
    assert row.exponents[-33] == 256
    assert counter.tallies["third", "gradient"].zeroed == 0
    assert counter.tallies["third", "gradient"].zeros == 256
    assert sum(row.seen.values()) == 63 * 256


def test_predicted_is_counted_in_a_tiny_gpt() -> None:
    recipe, batches = fixed("fp16", 1.0), [batch(step, 64) for step in range(6)]
    told = preflight(tiny_gpt(), batches, recipe)
    found = pairs(told, counted(tiny_gpt(), batches, recipe))
    assert len(found) >= 9
    assert apart(found) == []


def test_the_window_holds_in_a_real_run() -> None:
    """No step is skipped at the largest scale that works; at sixteen times that one, the first is."""
    batches = [batch(step) for step in range(4)]
    told = preflight(tiny_gpt(), batches, "fp16")
    assert told.scale is not None
    assert told.scale.smallest <= told.scale.recommended < told.scale.largest
    skipped = []
    for scale in (told.scale.largest, 16 * told.scale.largest):
        model = tiny_gpt()
        recipe = dataclasses.replace(
            Recipe.named("fp16"), loss_scaling=LossScaling(initial=scale, dynamic=False, cap=2.0**40)
        )
        mp = MixedPrecision(model, torch.optim.SGD(model.parameters(), lr=0.0), recipe)
        for tokens in batches:
            with mp.forward():
                loss = model(tokens)
            mp.backward(loss)
            skipped.append(mp.step().skipped)
    assert skipped[:4] == [False] * 4
    assert any(skipped[4:])


def test_small_gradients_ask_for_a_scale() -> None:
    class Small(Shrinking):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * 2.0**-14

    told = preflight(Small(1.0), inputs(2), "fp16")
    assert told.scale is not None
    assert told.scale.smallest > 1
    at_one = preflight(Small(1.0), inputs(2), fixed("fp16", 1.0))
    assert at_one.keep
    assert "gradients become zero in fp16" in at_one.keep[0].reason
    assert told.keep == ()


def test_a_layer_beyond_the_range_is_named_and_the_pattern_can_be_kept() -> None:
    model = Shrinking(1.0)
    with torch.no_grad():
        model.first.weight[0, 0] = 1e5
    told = preflight(model, inputs(2), "fp16")
    assert [kept.pattern for kept in told.keep] == ["first"]
    assert "weights reach 1e+05; the largest fp16 is 65504" in told.keep[0].reason
    assert "fp16 suits 2 of 3 linear layers" in told.verdict
    assert "keep first" in told.verdict
    kept = dataclasses.replace(Recipe.named("fp16"), keep=tuple(kept.pattern or "" for kept in told.keep))
    again = preflight(model, inputs(2), kept)
    assert again.keep == ()
    assert "suits all 3" in again.verdict


def test_layers_of_one_name_are_one_pattern() -> None:
    model = tiny_gpt()
    with torch.no_grad():
        for block in model.blocks:
            block.down.weight[0, 0] = 1e6
    told = preflight(model, [batch(0)], "fp16")
    assert [(kept.pattern, kept.modules) for kept in told.keep] == [("*.down", ("blocks.0.down", "blocks.1.down"))]


def test_a_matmul_that_cannot_be_kept_is_told_apart() -> None:
    class Scores(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return (self.up(x) * 1e3 @ (x * 1e3).t()).mean()

    told = preflight(Scores(), [torch.ones(4, 8) * 40], "fp16")
    (kept,) = (kept for kept in told.keep if kept.pattern is None)
    assert kept.modules == ("matmul",)
    assert "and 1 other matmul not" in told.verdict


def test_convolutions_count_under_their_own_name() -> None:
    class Wave(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.out = nn.Conv1d(1, 4, 3), nn.Linear(4, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.out(self.conv(x).mean(-1)).mean()

    told = preflight(Wave(), [torch.randn(2, 1, 9)], "bf16")
    kinds = {row.kind for row in told.rows if row.module == "conv"}
    assert kinds == {"weight", "activation", "gradient"}


def test_the_model_is_left_as_it_was() -> None:
    model = tiny_gpt()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model.head.weight.grad = torch.ones_like(model.head.weight)
    hooks = [len(module._forward_hooks) for module in model.modules()]
    preflight(model, [batch(0)], "fp8")
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(model.head.weight.grad, torch.ones_like(model.head.weight))
    assert model.blocks[0].up.weight.grad is None
    assert [len(module._forward_hooks) for module in model.modules()] == hooks


def test_buffers_stay_and_dropout_is_drawn_once() -> None:
    """The rehearsal of an 8-bit recipe leaves no trace in the float32 step after it."""
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 1), Loss())
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found = []
    for recipe in ("bf16", "fp8"):
        torch.manual_seed(0)
        found.append({(row.module, row.kind): row.exponents for row in preflight(model, inputs(2, 4), recipe).rows})
    assert found[0] == found[1]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_the_json_has_every_count() -> None:
    told = preflight(tiny_gpt(), [batch(0), batch(1)], "fp8").to_json()
    rows = {(row["name"], row["kind"]): row for row in told["modules"]}
    up = rows["blocks.0.up", "gradient"]
    assert sum(up["exponents"].values()) + up["zeros"] == up["values"] == 2 * 8 * 16 * 128
    assert sum(up["seen"].values()) == sum(up["exponents"].values())
    assert (up["format"], rows["blocks.0.up", "weight"]["format"]) == ("e5m2", "e4m3fn")
    assert told["formats"]["e5m2"]["largest"] == 57344
    assert told["loss_scale"] is None
    assert rows["blocks.0.scaled_dot_product_attention", "activation"]["format"] == "bf16"


def test_the_loss_scale_moves_gradients_only() -> None:
    told = preflight(tiny_gpt(), [batch(0)], fixed("fp16", 2.0**10)).to_json()
    for row in told["modules"]:
        moved = 10 if row["kind"].endswith("gradient") else 0
        assert {int(e) + moved: count for e, count in row["exponents"].items()} == {
            int(e): count for e, count in row["seen"].items()
        }


@pytest.mark.parametrize("recipe", ["fp16", "fp8"])
@pytest.mark.parametrize("place", ["weight", "input"])
def test_nan_in_float32_names_the_module(place: str, recipe: str) -> None:
    model, x = Shrinking(1.0), inputs(1)[0]
    if place == "weight":
        with torch.no_grad():
            model.second.weight[3, 4] = math.nan
    else:
        x[0, 0] = math.nan
    named = "second: 1 of 65536 values of its weight" if place == "weight" else "first: 1 of 16384 values of its act"
    with pytest.raises(FewbitsError, match=named):
        preflight(model, [x], recipe)


def test_bad_input_is_refused() -> None:
    model = Shrinking(1.0)
    with pytest.raises(FewbitsError, match="fp32 rounds nothing, so there is nothing to check; try fp16"):
        preflight(model, inputs(1), "fp32")
    with pytest.raises(FewbitsError, match="recipe 'fp17' is unknown; did you mean fp1"):
        preflight(model, inputs(1), "fp17")
    with pytest.raises(FewbitsError, match="batches: there are none"):
        preflight(model, [], "fp16")
    with pytest.raises(FewbitsError, match="answered with Tensor and no loss of one number"):
        preflight(model.first, inputs(1), "fp16")
    with pytest.raises(FewbitsError, match="keep pattern 'fourth' matches none"):
        preflight(model, inputs(1), dataclasses.replace(Recipe.named("fp16"), keep=("fourth",)))
    with pytest.raises(FewbitsError, match="loss: it is NaN in fp32 already"):
        preflight(LossOf(model, math.nan), inputs(1), "fp16")


def test_a_model_without_matmuls_has_nothing_to_tell() -> None:
    class Gain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gain = nn.Parameter(torch.ones(4))

        def forward(self, x: Tensor) -> Tensor:
            return (self.gain * x).mean()

    with pytest.raises(FewbitsError, match="no linear layer and no other matmul"):
        preflight(Gain(), [torch.ones(4)], "fp16")


def test_a_kept_layer_is_not_rounded_in_the_backward_pass_either() -> None:
    """The policy is on in the backward pass; the matmuls of linear layers, done by recipe, are not for it."""
    model = Shrinking(1.0)
    kept = dataclasses.replace(fixed("fp16", 1.0), keep=("first", "second", "third"))
    counter = counted(model, inputs(1), kept)
    assert {module for module, _ in counter.tallies} == {"first", "second", "third"}
    plain, ours = Shrinking(1.0), Shrinking(1.0)
    plain(inputs(1)[0]).backward()
    mp = MixedPrecision(ours, torch.optim.SGD(ours.parameters()), kept)
    with mp.forward():
        loss = ours(inputs(1)[0])
    mp.backward(loss)
    for theirs, mine in zip(plain.parameters(), ours.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-6, atol=0.0)


class Loss(nn.Module):
    """The last layer: a mean square."""

    def forward(self, x: Tensor) -> Tensor:
        return x.square().mean()


class LossOf(nn.Module):
    """A model whose loss is multiplied."""

    def __init__(self, model: nn.Module, factor: float) -> None:
        super().__init__()
        self.model, self.factor = model, factor

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x) * self.factor
