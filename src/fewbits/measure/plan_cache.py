"""Which keys and values a model keeps, by layer, from its configuration."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import transformers
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from fewbits.measure.plan_bytes import CacheLayer


def decoder_of(config: transformers.PreTrainedConfig) -> Any:
    """The configuration of what writes text."""
    return config.get_text_config(decoder=True)


def depth_of(config: transformers.PreTrainedConfig) -> int:
    """Layers of what writes; T5 and its kin say so under a name of their own."""
    text = decoder_of(config)
    return int(getattr(text, "num_decoder_layers", None) or getattr(text, "num_hidden_layers", None) or 1)


def cache_layers(config: transformers.PreTrainedConfig) -> tuple[CacheLayer, ...]:
    """Keys and values by layer, layers that are alike together."""
    text = decoder_of(config)
    keys, values, heads = _widths(text)
    windows = _windows(config, depth_of(config))
    layers = [CacheLayer(keys, values, heads, window, count) for window, count in Counter(windows).items()]
    if config.is_encoder_decoder:  # and those of the input, which every layer looks at
        layers.append(CacheLayer(keys, values, heads, None, len(windows)))
    return tuple(layers)


def _widths(text: Any) -> tuple[int, int, int]:
    """Numbers of a token's keys and of its values in a layer, and their heads."""
    heads = int(text.num_attention_heads)
    D = int(getattr(text, "head_dim", None) or text.hidden_size // heads)
    if getattr(text, "kv_lora_rank", None) and getattr(text, "qk_rope_head_dim", None):
        return int(text.kv_lora_rank), int(text.qk_rope_head_dim), 1  # latent attention keeps what all heads share
    groups = getattr(text, "num_key_value_heads", None) or getattr(text, "num_kv_heads", None) or heads
    if getattr(text, "multi_query", False) and not getattr(text, "new_decoder_architecture", False):
        groups = 1
    return groups * D, groups * D, int(groups)


def _windows(config: transformers.PreTrainedConfig, count: int) -> Sequence[int | None]:
    """Tokens that each layer with keys and values keeps, as transformers' own cache has it; None: all."""
    try:
        layers = transformers.DynamicCache(config=config).layers
    except Exception:  # a configuration that the cache cannot read: then every layer keeps all
        layers = []
    found: list[int | None] = []
    for layer in layers:
        if isinstance(layer, DynamicSlidingWindowLayer):
            found.append(int(layer.sliding_window) - 1)  # the token that is written sees itself too
        elif isinstance(layer, DynamicLayer):
            found.append(None)
    return found if layers and not config.is_encoder_decoder else [None] * count
