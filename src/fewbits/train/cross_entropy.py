"""Cross entropy of 16-bit logits, a few rows at a time: the float32 values are never all in memory.

    forward          loss_t = log Σ_v exp x_tv − x_ty            in float32; of each row only the log of the sum stays
    gradient         dx_tv = (exp(x_tv − log Σ) − [v = y_t]) · g_t     in float32, rounded once to the logits' format

What PyTorch computes from logits in float32, up to the order of sums, without four passes over new memory of that size.

Letters: T tokens, V entries of the vocabulary.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

_PIECE = 1 << 20  # elements that are widened at a time: 4 MiB, which the last cache holds


_DEFAULTS = {"weight": None, "size_average": None, "reduce": None, "label_smoothing": 0.0}
"""What else PyTorch's function takes: only as it is by default."""


def takes(x: Any, target: Any, rest: dict[str, Any]) -> bool:
    """Whether ``cross_entropy`` computes this call of ``torch.nn.functional.cross_entropy``."""
    return (
        isinstance(x, Tensor)
        and isinstance(target, Tensor)
        and x.dtype in (torch.float16, torch.bfloat16)
        and x.device.type == "cpu"
        and x.ndim == 2
        and target.dtype == torch.int64
        and target.shape == x.shape[:1]
        and x.numel() > 0
        and all(name in ("ignore_index", "reduction") or _is_default(name, value) for name, value in rest.items())
        and rest.get("reduction", "mean") in ("mean", "sum", "none")
        and _in_range(target, x.shape[1], rest.get("ignore_index", -100))
    )


def _is_default(name: str, value: Any) -> bool:
    return name in _DEFAULTS and not isinstance(value, Tensor) and bool(value == _DEFAULTS[name])


def _in_range(target: Tensor, V: int, ignore_index: int) -> bool:
    """What is not is left to PyTorch, which says so."""
    return bool((((target >= 0) & (target < V)) | (target == ignore_index)).all())


def cross_entropy(
    x: Tensor, target: Tensor, ignore_index: int = -100, reduction: str = "mean", **defaults: float | None
) -> Tensor:
    """The loss of 16-bit logits, in float32.

    Args:
        x: float16 or bfloat16 ``[T, V]``. A row with NaN gives NaN, one with Inf gives Inf or NaN.
        target: int64 ``[T]``, 0 to V − 1; or ``ignore_index``: that row counts for nothing.
        ignore_index: See there.
        reduction: mean (over the rows that count; NaN if there are none), sum, or none: ``[T]``.
        defaults: Other arguments of PyTorch's function, as they are by default.
    """
    counts = target != ignore_index
    losses = cast(Tensor, _Rows.apply(x, torch.where(counts, target, 0), counts))  # type: ignore[no-untyped-call]
    if reduction == "none":
        return losses
    return losses.sum() / counts.sum() if reduction == "mean" else losses.sum()


class _Rows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, target: Tensor, counts: Tensor) -> Tensor:
        log_sums = torch.cat([torch.logsumexp(rows.float(), 1) for rows in torch.split(x, _rows(x))])
        ctx.save_for_backward(x, target, counts, log_sums)
        return torch.where(counts, log_sums - x.gather(1, target[:, None])[:, 0].float(), 0.0)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor | None, ...]:
        x, target, counts, log_sums = ctx.saved_tensors
        factors = torch.where(counts, gradients[0], 0.0)[:, None]  # [T, 1]
        dx, step = torch.empty_like(x), _rows(x)
        buffer = torch.empty((min(step, len(x)), x.shape[1]))
        for start in range(0, len(x), step):
            rows = slice(start, start + step)
            wide = torch.sub(x[rows], log_sums[rows, None], out=buffer[: len(x[rows])]).exp_()
            wide.scatter_add_(1, target[rows, None], wide.new_full((len(wide), 1), -1.0))
            dx[rows] = wide.mul_(factors[rows])
        return dx, None, None


def _rows(x: Tensor) -> int:
    return max(1, _PIECE // x.shape[1])
