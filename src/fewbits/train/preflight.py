"""Preflight: what a lower precision would make of a model's numbers, told from a few steps in float32.

    batches ──float32 forward and backward──> histograms of every operand of a matmul ──format──> zero, subnormal,
                                                                                                saturated fractions
The scales of 8-bit tensors are told by a rehearsal: each batch once more, in the recipe's own arithmetic. They come
from the largest magnitude, and where that is near a power of two, the errors of the layers before decide.

The model is not changed: no step is applied. The sizes of gradients depend on the batch and the length of its texts,
since the loss is their mean: take those of the training to come.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from torch import nn

from fewbits.errors import FewbitsError
from fewbits.formats import Format
from fewbits.train.arguments import check_model, kept_names
from fewbits.train.policy import Policy, linear_weights
from fewbits.train.preflight_observers import Recorder
from fewbits.train.preflight_prediction import (
    OPERANDS,
    SCALED,
    Fractions,
    Kept,
    ScaleWindow,
    Zones,
    fractions,
    keep,
    scale_window,
    tolerance,
)
from fewbits.train.preflight_rehearsal import ONE_SCALE, Batch, left_as_it_was, loss_of, rehearse
from fewbits.train.recipe import Recipe

Progress = Callable[[int, int], None]
"""Called with steps done and steps in all, where that is known."""

KINDS = (*OPERANDS, "weight_gradient")


@dataclass(frozen=True)
class Row:
    """One kind of numbers of one module.

    Attributes:
        module: Its name; of matmuls that are no layers, with the function's name.
        kind: weight, activation, gradient (of its output) or weight_gradient.
        format: The format that it would take.
        values: How many values were seen, zeros too.
        zeros: How many were zero in float32.
        infinite: How many were ±Inf in float32.
        nan: How many were NaN in float32: none, or there is no report.
        largest: The largest finite magnitude.
        exponents: How many finite values have each binary exponent, in float32.
        seen: The same after the recipe's scaling: the loss scale, or the scales of 8-bit operands.
        predicted: What the format makes of them.
    """

    module: str
    kind: str
    format: str
    values: int
    zeros: int
    infinite: int
    nan: int
    largest: float
    exponents: dict[int, int]
    seen: dict[int, int]
    predicted: Fractions


@dataclass(frozen=True)
class Preflight:
    """What ``preflight`` found.

    Attributes:
        recipe: The one that was asked about.
        rows: One for each module and kind, in the order of the forward pass.
        scale: The loss scales that work; None where the recipe scales no loss.
        keep: The layers to keep in a wider format.
        linears: How many linear layers take part.
        steps: How many steps were looked at.
        loss: Their mean loss in float32.
    """

    recipe: Recipe
    rows: tuple[Row, ...]
    scale: ScaleWindow | None
    keep: tuple[Kept, ...]
    linears: int
    steps: int
    loss: float

    @property
    def verdict(self) -> str:
        """Whether the precision suits the model, in one line."""
        name, layers = self.recipe.name, f"{self.linears} linear layers"
        bad = sum(len(kept.modules) for kept in self.keep if kept.pattern is not None)
        other = sum(len(kept.modules) for kept in self.keep if kept.pattern is None)
        says = f"{name} suits all {layers}" if not bad else f"{name} suits {self.linears - bad} of {layers}"
        if other:
            says += f", and {other} other matmul{'s' if other > 1 else ''} not"
        if self.scale is not None:
            low, high, best = (f"2^{int(math.log2(value))}" for value in _scales(self.scale))
            says += f", with loss scale {best} ({low} to {high} work)"
        if bad:
            says += "; keep " + ", ".join(kept.pattern for kept in self.keep if kept.pattern is not None)
        return says

    def to_json(self) -> dict[str, Any]:
        """Plain data; ``docs/preflight.md`` describes it."""
        used = sorted({row.format for row in self.rows})
        return {
            "version": 1,
            "precision": self.recipe.name,
            "recipe": self.recipe.to_json(),
            "steps": self.steps,
            "loss": self.loss,
            "linear_layers": self.linears,
            "verdict": self.verdict,
            "loss_scale": None if self.scale is None else asdict(self.scale),
            "formats": {name: _format_json(name) for name in used},
            "keep": [asdict(kept) | {"modules": list(kept.modules)} for kept in self.keep],
            "modules": [_row_json(row) for row in self.rows],
        }


def preflight(
    model: nn.Module, batches: Iterable[Batch], recipe: str | Recipe, progress: Progress | None = None
) -> Preflight:
    """Run a model over batches in float32 and tell what a recipe's formats would make of its numbers.

    Args:
        model: Its trained parameters are float32. They are not changed, and neither are their ``.grad``.
        batches: One for each step; ``model(**batch)`` or ``model(batch)`` gives the loss.
        recipe: fp16, bf16, fp8, or a ``Recipe``. Its ``keep`` is obeyed. A loss scale that is not dynamic is taken as
            it is; else gradients are judged at the recommended one.
        progress: Called after each step.

    Raises:
        FewbitsError: A recipe that rounds nothing, no batch, no matmul that a recipe rounds, a NaN in float32 (the
            message names the module), or what ``MixedPrecision`` refuses too.
    """
    wanted = check_recipe(recipe)
    check_model(model)
    weights = linear_weights(model)
    kept = kept_names(wanted, list(weights))
    recorder = Recorder(wanted, kept)
    plain = Policy(Recipe.named("fp32"), {id(weight): (name, False) for name, weight in weights.items()})
    plain.observe(recorder)
    rehearsed = Policy(wanted, {id(weight): (name, name in kept) for name, weight in weights.items()})
    losses: list[float] = []
    total = len(batches) if hasattr(batches, "__len__") else 0  # type: ignore[arg-type]
    with left_as_it_was(model), recorder.watching(model):
        for batch in batches:
            recorder.begin_step(rehearse(model, batch, rehearsed) if wanted.scaling in ONE_SCALE else {})
            losses.append(_run(model, batch, plain))
            recorder.end_step()
            if progress:
                progress(len(losses), max(total, len(losses)))
    return _judged(recorder, wanted, losses)


def check_recipe(recipe: str | Recipe, keep: Sequence[str] = ()) -> Recipe:
    """The recipe of this name, with more layers kept.

    Raises:
        FewbitsError: An unknown name, or a recipe that rounds nothing.
    """
    found = Recipe.named(recipe)
    if all(fmt.name == "fp32" for fmt in (found.weights, found.activations, found.gradients, found.results)):
        raise FewbitsError(f"recipe {found.name}: fp32 rounds nothing, so there is nothing to check; try fp16")
    return replace(found, keep=(*found.keep, *keep))


def _run(model: nn.Module, batch: Batch, policy: Policy) -> float:
    loss = loss_of(model, batch, policy)
    value = float(loss.detach())
    if math.isnan(value):
        raise FewbitsError("loss: it is NaN in fp32 already, though no operand of a matmul is; look at the last layers")
    loss.backward()  # type: ignore[no-untyped-call]
    return value


def _judged(recorder: Recorder, recipe: Recipe, losses: list[float]) -> Preflight:
    if not losses:
        raise FewbitsError("batches: there are none, so nothing was seen; give at least one")
    records = recorder.records
    if not records:
        raise FewbitsError("model: it has no linear layer and no other matmul, so a lower precision changes nothing")
    window = scale_window(records, recipe.loss_scaling) if recipe.loss_scaling is not None else None
    scale = window.recommended if window is not None else 1.0
    rows = []
    for (module, kind), record in records.items():
        if kind not in KINDS:
            continue
        factor = scale if kind in SCALED else 1.0
        raw = record.raw
        seen = record.seen.by_exponent()
        rows.append(
            Row(
                module, kind, record.fmt.name, raw.values, raw.zeros, raw.infinite, raw.counts.nan,
                raw.counts.largest, raw.by_exponent(), {e + int(math.log2(factor)): n for e, n in seen.items()},
                fractions(record.seen, record.fmt, factor),
            )
        )  # fmt: skip
    kept = keep(records, recorder.linears, scale)
    return Preflight(recipe, tuple(rows), window, kept, len(recorder.linears), len(losses), sum(losses) / len(losses))


def _scales(window: ScaleWindow) -> tuple[float, float, float]:
    return window.smallest, window.largest, window.recommended


def _format_json(name: str) -> dict[str, Any]:
    fmt = Format.named(name)
    zones = Zones.of(fmt)
    return {
        "bits": fmt.bits, "largest": fmt.max, "smallest_normal": fmt.smallest_normal,
        "smallest_subnormal": fmt.smallest_subnormal, "zero_to": zones.zero_to, "over_from": zones.over_from,
        "tolerance": tolerance(fmt),
    }  # fmt: skip


def _row_json(row: Row) -> dict[str, Any]:
    predicted = asdict(row.predicted)
    return {
        "name": row.module, "kind": row.kind, "format": row.format, "values": row.values, "zeros": row.zeros,
        "infinite": row.infinite, "nan": row.nan, "largest": row.largest,
        "exponents": {str(e): n for e, n in row.exponents.items()}, "seen": {str(e): n for e, n in row.seen.items()},
        **predicted,
    }  # fmt: skip
