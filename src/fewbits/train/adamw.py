"""AdamW in one sweep: unscale, clip, moments, weight, low-precision copy. The plain meaning, and the choice of kernel.

For every element, each operation rounded to float32 once:

    g  = gradient · factor                           1 / loss scale, and the clipping
    m  = m + (g − m) · (1 − β1)
    v  = v · β2 + (g · g) · (1 − β2)
    s  = m / (√v · 1/√(1 − β2ᵗ) + ε) · lr / (1 − β1ᵗ)
    w  = w · (1 − lr · decay) − s                    a kahan master adds  w · (−lr · decay) − s  instead

Loshchilov and Hutter, "Decoupled Weight Decay Regularization", arXiv 1711.05101, algorithm 2.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from fewbits.kernels import adamw as kernels
from fewbits.tensors.random import key_of
from fewbits.train.storage import STATE_CODES, Storage, root, seed_of


@dataclass(frozen=True)
class Coefficients:
    """The numbers of one parameter's update; all are rounded to float32 where they meet a tensor."""

    factor: float
    first_weight: float
    second_keep: float
    second_weight: float
    root_scale: float
    eps: float
    step_size: float
    decay: float
    decay_rate: float

    @classmethod
    def of(
        cls, lr: float, betas: tuple[float, float], eps: float, weight_decay: float, steps: int, factor: float
    ) -> Coefficients:
        """Those of the update number ``steps``, from 1."""
        beta1, beta2 = betas
        return cls(
            factor=factor,
            first_weight=1 - beta1,
            second_keep=beta2,
            second_weight=1 - beta2,
            root_scale=1 / math.sqrt(1 - beta2**steps),
            eps=eps,
            step_size=lr / (1 - beta1**steps),
            decay=1 - lr * weight_decay,
            decay_rate=-lr * weight_decay,
        )


@dataclass(frozen=True)
class Update:
    """One parameter's part of the sweep.

    Attributes:
        storage: The parameter and its moments; ``steps`` already counts this update.
        gradient: float32, bfloat16 or float16, the shape of the parameter.
        coefficients: Its numbers.
        copy: float16 or bfloat16, filled with the new weight rounded to nearest; or None.
    """

    storage: Storage
    gradient: Tensor
    coefficients: Coefficients
    copy: Tensor | None


@torch.no_grad()
def adamw(updates: list[Update], seed: int) -> None:
    """Update the parameters in place; ``seed`` is the recipe's. Compiled and plain results are bit-equal."""
    if kernels.adamw([_row(update, seed) for update in updates], STATE_CODES):
        return
    for update in updates:
        adamw_plain(update, seed)


def adamw_plain(update: Update, seed: int) -> None:
    """The meaning of ``adamw``, in PyTorch."""
    storage, c = update.storage, update.coefficients
    own = seed_of(seed, storage.steps, storage.index)
    g = update.gradient.float() * c.factor
    m, v = storage.moments()
    m = m + (g - m) * c.first_weight
    v = v * c.second_keep + (g * g) * c.second_weight
    step = m / (root(v) * c.root_scale + c.eps) * c.step_size
    storage.keep_moments(m, v, own)
    value = storage.master_value()
    if storage.master == "kahan":
        storage.add_compensated(value * c.decay_rate - step)
    else:
        value = value * c.decay - step
        storage.keep_master(value, own)
    if update.copy is not None:
        update.copy.copy_(value)


def _row(update: Update, seed: int) -> kernels.Row:
    storage, c = update.storage, update.coefficients
    first = seed_of(seed, storage.steps, storage.index)
    return kernels.Row(
        gradient=update.gradient,
        param=storage.param.detach(),
        low=storage.low,
        m=storage.m,
        v=storage.v,
        m_scales=storage.m_scales,
        v_scales=storage.v_scales,
        copy=update.copy,
        master=storage.master,
        keys=(key_of(first), key_of(first + 1), key_of(first + 2)),
        coefficients=(
            c.factor, c.first_weight, c.second_keep, c.second_weight, c.root_scale, c.eps, c.step_size, c.decay,
            c.decay_rate,
        ),
    )  # fmt: skip
