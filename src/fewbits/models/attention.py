"""Attention of few queries under transformers' ``AttentionInterface``, by the name ``fewbits``.

    T ≤ 16 queries, CPU, no gradient, a mask of bools or none   ->  the op, which reads keys and values once
    all else                                                    ->  transformers' own ``sdpa``

Letters: B texts, T queries of each, S positions, Q query heads, D channels of a head.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from fewbits.kernels import native
from fewbits.kernels.attention import attention

NAME = "fewbits"
_MOST_QUERIES = 16
_INTERNAL = "_attn_implementation_internal"
# What sdpa does not look at, or what says nothing where there is no cache of another kind.
_HARMLESS = {
    "position_ids", "cache_position", "sliding_window", "use_cache", "output_attentions", "output_hidden_states",
    "logits_to_keep", "return_dict",
}  # fmt: skip


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention ``[B, T, Q, D]`` of a module of transformers; see ``sdpa_attention_forward``."""
    T, S = query.shape[2], key.shape[2]
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    if (
        _can_run(query, key, value, attention_mask)
        and dropout == 0.0
        and (T == 1 or attention_mask is not None or not causal or T == S)
        and not any(given is not None and given is not False for name, given in kwargs.items() if name not in _HARMLESS)
    ):
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        return attention(query, key, value, attention_mask, scale, bool(causal) and T > 1), None
    result: tuple[Tensor, None] = sdpa_attention_forward(
        module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, is_causal=is_causal, **kwargs
    )
    return result


def _can_run(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> bool:
    B, Q, T, D = query.shape
    if T > _MOST_QUERIES or query.device.type != "cpu" or query.dtype not in (torch.float32, torch.bfloat16):
        return False
    if not query.dtype == key.dtype == value.dtype or key.shape != value.shape or key.shape[::3] != (B, D):
        return False
    if Q % key.shape[1] or (mask is not None and (mask.dtype != torch.bool or mask.ndim != 4)):
        return False
    if mask is not None and (mask.shape[1] != 1 or mask.shape[0] not in (1, B) or mask.shape[2] not in (1, T)):
        return False
    if mask is not None and mask.shape[3] != key.shape[2]:
        return False
    return not (torch.is_grad_enabled() and any(each.requires_grad for each in (query, key, value)))


def use_attention(model: PreTrainedModel) -> bool:
    """Let a model attend by the op where it attends by sdpa, and where its code goes through the interface.

    Returns:
        Whether it does now.
    """
    parts = [module for module in model.modules() if isinstance(module, PreTrainedModel)]
    if not native.status().loaded or not all(part._can_set_attn_implementation() for part in parts):
        return False
    configs = {id(config): config for config in (model.config, *(getattr(m, "config", None) for m in model.modules()))}
    found = [config for config in configs.values() if getattr(config, _INTERNAL, None) == "sdpa"]
    for config in found:
        setattr(config, _INTERNAL, NAME)
    return bool(found)


AttentionInterface.register(NAME, attend)
AttentionMaskInterface.register(NAME, sdpa_mask)
