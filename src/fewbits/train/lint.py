"""Combinations that are known to go wrong: each warns when training is set up, with the reason and the remedy.

What is not here cannot happen here: moments in 16 or 8 bits are rounded stochastically, so a long average of them does
not stop; masters that are split are exact; gradients of micro-batches add up in float32.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.optim import NAdam, Optimizer, RAdam, RMSprop
from torch.optim.adadelta import Adadelta
from torch.optim.adagrad import Adagrad
from torch.optim.adam import Adam
from torch.optim.adamax import Adamax

from fewbits.errors import PrecisionWarning
from fewbits.train.recipe import Recipe

# A kahan master p has 8 bits, so what rounding has lost of it stays below 2^-9 p; that has 8 bits too, and a change
# below half of its ulp, 2^-9 · 2^-9 p, leaves no trace.
_KAHAN_REACH = 2.0**-18
_DIVIDES_BY_EPS = (Adam, NAdam, RAdam, Adamax, RMSprop, Adagrad, Adadelta)  # AdamW is an Adam


def lint(recipe: Recipe, model: nn.Module, optimizer: Optimizer) -> None:
    """Warn of what is known to go wrong with this recipe, model and optimizer.

    Warns:
        PrecisionWarning: Once for each, with the reason and the remedy.
    """
    for message in (
        *_fp16_unscaled(recipe),
        *_second_scaler(model, optimizer),
        *_eps_that_is_zero(optimizer),
        *_changes_that_are_lost(recipe, optimizer),
    ):
        warnings.warn(f"recipe {recipe.name}: {message}", PrecisionWarning, stacklevel=3)


def _fp16_unscaled(recipe: Recipe) -> Iterator[str]:
    """The smallest number of fp16 is 2^-24, and gradients of large models are often smaller."""
    scaling = recipe.loss_scaling
    scaled = scaling is not None and (scaling.dynamic or scaling.initial > 1)
    if recipe.results.name == "fp16" and not scaled:
        yield "fp16 without loss scaling: gradients below 2^-24 become zero; take loss_scaling=LossScaling(), or bf16"
    elif recipe.keep and recipe.kept.name == "fp16" and not scaled:
        yield (
            "kept='fp16' without loss scaling: gradients of the kept layers below 2^-24 become zero; take kept='bf16' "
            "or loss_scaling=LossScaling()"
        )


def _second_scaler(model: nn.Module, optimizer: Optimizer) -> Iterator[str]:
    """Two that cast or scale: results that neither has promised."""
    if hasattr(model, "_original_forward"):  # where Accelerator.prepare with mixed_precision keeps the plain one
        yield (
            "the model's forward is wrapped by accelerate's mixed precision, which casts again what the recipe has "
            "cast; take Accelerator(mixed_precision='no')"
        )
    if getattr(optimizer, "scaler", None) is not None:
        yield (
            "the optimizer has a GradScaler of its own: gradients would be unscaled twice; take "
            "Accelerator(mixed_precision='no')"
        )


def _eps_that_is_zero(optimizer: Optimizer) -> Iterator[str]:
    """A weight whose gradients are all zero is updated by 0 / (√0 + ε)."""
    if not isinstance(optimizer, _DIVIDES_BY_EPS):
        return
    for eps in sorted({group["eps"] for group in optimizer.param_groups}):
        if float(torch.tensor(eps, dtype=torch.float32)) == 0:
            yield (
                f"eps={eps:g} is 0 in float32, where the update is computed: a weight whose gradients are all zero "
                "becomes NaN; take eps=1e-8"
            )
            return


def _changes_that_are_lost(recipe: Recipe, optimizer: Optimizer) -> Iterator[str]:
    """Changes of weights that are too small, relative to them, for kahan masters."""
    if recipe.master != "kahan":
        return
    remedy = "take master='split', which is exact"
    for group in optimizer.param_groups:
        # A schedule may have begun with a rate near 0. An update of Adam's is about the rate.
        lr, decay = float(group.get("initial_lr", group["lr"])), float(group["weight_decay"])
        size = max((_typical(param) for param in group["params"] if param.ndim >= 2), default=0.0)
        if 0 < lr < _KAHAN_REACH * size:
            yield (
                f"lr={lr:g} is below 2^-18 of weights of typical size {size:.2g}: kahan masters lose updates of that "
                f"size; {remedy}"
            )
            return
        if size and 0 < lr * decay < _KAHAN_REACH:
            yield (
                f"lr · weight_decay = {lr * decay:.2g} is below 2^-18: kahan masters lose the decay, all of it where "
                f"gradients are zero; {remedy}, or weight_decay=0"
            )
            return


def warn_of_autocast() -> None:
    """Warn if ``torch.autocast`` is on where a recipe is about to be obeyed.

    Warns:
        PrecisionWarning: If so.
    """
    for device in ("cpu", "cuda"):
        if torch.is_autocast_enabled(device):
            warnings.warn(
                f"torch.autocast is on for {device}: it casts again what the recipe has cast, by lists of its own; "
                "leave the `with torch.autocast(...)` out",
                PrecisionWarning,
                stacklevel=2,
            )


@torch.no_grad()
def _typical(param: Tensor) -> float:
    """The root mean square of a parameter."""
    norm = torch.linalg.vector_norm(param, dtype=torch.float32).item()
    return float(norm / max(1, param.numel()) ** 0.5)
