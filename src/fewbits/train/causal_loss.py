"""The loss of transformers' causal models from 16-bit logits: theirs widens all of them to float32 first."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.nn import functional


def causal_models(model: nn.Module) -> list[nn.Module]:
    """The modules that take transformers' own loss of causal models, by their type of loss or for want of one."""
    return [
        module
        for module in model.modules()
        if hasattr(type(module), "loss_function") and getattr(module, "loss_type", None) in (None, "ForCausalLM")
    ]


@contextmanager
def narrow_loss(modules: list[nn.Module]) -> Iterator[None]:
    """In this context those modules take ``causal_loss``; a loss that the user has set stays."""
    changed = [module for module in modules if not hasattr(module, "_loss_function")]
    for module in changed:
        module._loss_function = causal_loss  # type: ignore[assignment]
    try:
        yield
    finally:
        for module in changed:
            del module._loss_function


def causal_loss(
    logits: Tensor,
    labels: Tensor | None,
    vocab_size: int,
    num_items_in_batch: Tensor | int | None = None,
    ignore_index: int = -100,
    shift_labels: Tensor | None = None,
    **_: Any,
) -> Tensor:
    """The loss of predicting each next token; transformers gives these arguments.

    Args:
        logits: ``[…, T, V]``, any float dtype; the policy takes care of precision.
        labels: int64 ``[…, T]``: the token at each place.
        vocab_size: V.
        num_items_in_batch: What the sum is divided by; None: the tokens that count here.
        ignore_index: Of places that count for nothing.
        shift_labels: int64 ``[…, T]``: the token after each place, instead of ``labels``.
    """
    if shift_labels is None:
        assert labels is not None
        shift_labels = functional.pad(labels, (0, 1), value=ignore_index)[..., 1:]
    target = shift_labels.reshape(-1).to(logits.device)
    reduction = "mean" if num_items_in_batch is None else "sum"
    loss = functional.cross_entropy(logits.view(-1, vocab_size), target, ignore_index=ignore_index, reduction=reduction)
    if num_items_in_batch is None:
        return loss
    return loss / (num_items_in_batch.to(loss.device) if isinstance(num_items_in_batch, Tensor) else num_items_in_batch)
