"""Attention of few queries on the CPU, reading keys and values once: an op.

Letters: B texts, T queries of each, S positions, Q query heads, G key and value heads, D channels of a head.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fewbits.errors import FewbitsError
from fewbits.kernels import ops


def _shape(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float, causal: bool) -> Tensor:
    if not query.dtype == key.dtype == value.dtype or query.dtype not in (torch.float32, torch.bfloat16):
        raise FewbitsError(
            f"query, key, value: all float32 or all bfloat16 are needed, got {query.dtype}, {key.dtype} and "
            f"{value.dtype}; convert them"
        )
    if any(each.ndim != 4 for each in (query, key, value)) or query.shape[-1] == 0:
        raise FewbitsError(
            f"query, key, value: [B, heads, tokens, D] are needed, got {list(query.shape)}, {list(key.shape)} and "
            f"{list(value.shape)}"
        )
    B, Q, T, D = query.shape
    G, S = key.shape[1:3]
    if key.shape != (B, G, S, D) or value.shape != key.shape or G == 0 or Q % G:
        raise FewbitsError(
            f"key, value: [{B}, G, S, {D}] with G a divisor of {Q} are needed, got {list(key.shape)} and "
            f"{list(value.shape)}"
        )
    if mask is not None and (
        mask.dtype != torch.bool
        or mask.ndim != 4
        or any(size not in (1, wanted) for size, wanted in zip(mask.shape[:3], (B, 1, T), strict=True))
        or mask.shape[3] != S
    ):
        raise FewbitsError(f"mask: bool [{B}, 1, {T}, {S}] is needed, got {mask.dtype} {list(mask.shape)}")
    if causal and mask is None and T > S:
        raise FewbitsError(f"causal: {T} queries are more than the {S} positions that they are the last of")
    return query.new_empty((B, T, Q, D))


def reference(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float, causal: bool) -> Tensor:
    """What the op means, in plain PyTorch and float32."""
    repeats, T, S = query.shape[1] // key.shape[1], query.shape[2], key.shape[2]
    keys, values = (each.float().repeat_interleave(repeats, 1) for each in (key, value))
    if mask is None and causal and T > 1:  # one by one: what a query does not see is not multiplied by 0 either
        ends = range(S - T + 1, S + 1)
        each = [reference(query[:, :, t : t + 1], key[:, :, :end], value[:, :, :end], None, scale, False)
                for t, end in enumerate(ends)]  # fmt: skip
        return torch.cat(each, 1).contiguous()
    scores = (query.float() * scale) @ keys.mT
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    weights = scores.softmax(-1)
    if mask is not None:
        weights = weights.masked_fill(~mask.any(-1, keepdim=True), 0)  # who sees nothing gets 0, not NaN
    return (weights @ values).transpose(1, 2).to(query.dtype).contiguous()


ops.define(
    "attention",
    "(Tensor query, Tensor key, Tensor value, Tensor? mask, float scale, bool causal) -> Tensor",
    _shape, reference,
)  # fmt: skip


def attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float, causal: bool = False
) -> Tensor:
    """``softmax(scale · query · keyᵀ) · value`` of each head, for queries that are the last of the positions.

    Sums are in float32, whatever the dtype. A query that sees nothing gets 0. NaN or Inf in a query make it NaN, in a
    key or value those queries that see its position (a mask does not hide a value of NaN).

    Args:
        query: ``[B, Q, T, D]``, float32 or bfloat16, any strides.
        key: ``[B, G, S, D]``, of the same dtype; Q / G query heads share one.
        value: The same.
        mask: bool ``[B or 1, 1, T or 1, S]``, True where a query sees a position; None: see ``causal``.
        scale: Of the products.
        causal: Without a mask: each query sees the positions up to its own, else all.

    Returns:
        ``[B, T, Q, D]``, contiguous, of query's dtype.

    Raises:
        FewbitsError: If a dtype or shape is another.
    """
    result: Tensor = torch.ops.fewbits.attention(query, key, value, mask, scale, causal)
    return result
