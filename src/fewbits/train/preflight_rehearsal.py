"""A step in the recipe's own arithmetic before the one in float32: it tells the scales of 8-bit tensors.

A scale is a power of two that comes from the largest magnitude. Where that is near a power of two itself, the errors of
all layers before decide which scale it is, and half of the subnormal numbers with it: float32 cannot tell.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from fewbits.errors import FewbitsError
from fewbits.formats import Format
from fewbits.train.policy import Policy
from fewbits.train.scaling import scale_exponents

Batch = Mapping[str, Any] | Tensor
"""What the model is called with: keywords, or one tensor. Its answer is the loss, or has it as ``.loss``."""

Scales = dict[str, list[int]]
"""By operand, the k of the scales 2^k of a whole tensor, in the order of their use in a step."""

ONE_SCALE = ("tensor", "delayed")
"""Recipes' scalings with one scale for a tensor; of rows and blocks there are so many that few are near the next."""


class ScaleNotes:
    """Notes the scales of whole 8-bit tensors in a run by a recipe; see ``fewbits.train.matmul.Observer``."""

    def __init__(self) -> None:
        self.scales: Scales = {}

    def operand(self, key: str, before: Tensor, after: Tensor, fmt: Format, amax: Tensor | None, square: bool) -> None:
        """Note the scale of an operand."""
        if amax is None:
            return
        exponents = scale_exponents(before, fmt, amax, square)
        if exponents.ndim == 0 and bool(exponents.isfinite()):
            self.scales.setdefault(key, []).append(int(exponents))

    def result(self, key: str, result: Tensor) -> None:
        """Nothing to note."""

    def matmul(self, func: Any, args: tuple[Any, ...], result: Any) -> None:
        """Nothing to note: operands of these have no scales."""


def loss_of(model: nn.Module, batch: Batch, policy: Policy) -> Tensor:
    """Run a batch by a policy, without the gradients of the batch before.

    Raises:
        FewbitsError: The model gives no loss.
    """
    for param in model.parameters():
        param.grad = None
    with policy.entered():
        answer = model(batch) if isinstance(batch, Tensor) else model(**batch)
    loss = answer if isinstance(answer, Tensor) else getattr(answer, "loss", None)
    if not isinstance(loss, Tensor) or loss.numel() != 1 or not loss.requires_grad:
        raise FewbitsError(
            f"model: it answered with {type(answer).__name__} and no loss of one number; give batches with labels, or "
            "a model that returns its loss"
        )
    return loss


def rehearse(model: nn.Module, batch: Batch, policy: Policy) -> Scales:
    """Run a batch by the recipe; what is drawn at random, as by dropout, is drawn again in float32 after it.

    Where the loss is not finite, the gradients have no scales here: float32's have to do.
    """
    notes = ScaleNotes()
    policy.observe(notes)
    with torch.random.fork_rng():
        loss = loss_of(model, batch, policy)
        if bool(loss.detach().isfinite()):
            loss.backward()  # type: ignore[no-untyped-call]
    policy.history.end_step(keep=True)
    return notes.scales


@contextmanager
def left_as_it_was(model: nn.Module) -> Iterator[None]:
    """Give back the gradients and buffers at the end."""
    gradients = {param: param.grad for param in model.parameters()}
    buffers = {buffer: buffer.clone() for buffer in model.buffers()}
    try:
        yield
    finally:
        for param, gradient in gradients.items():
            param.grad = gradient
        with torch.no_grad():
            for buffer, value in buffers.items():
                buffer.copy_(value)
