"""Keys and values in int8 with a scale for each head and token: a quarter of the memory, and of what attention reads.

    x ≈ code · scale, scale = max|x| / 127 over the D channels of a head: 1 + 4 / D bytes a number, where float32 has 4

Letters: B texts, G key and value heads, T new tokens, D channels of a head.
"""

from __future__ import annotations

from functools import partial
from inspect import signature
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicLayer, DynamicSlidingWindowLayer, EncoderDecoderCache

from fewbits.errors import FewbitsError
from fewbits.kernels import ops
from fewbits.models.kv_cache import GrowingLayer, GrowingSlidingLayer, Held, grown

CACHES = ("int8",)
"""What ``kv_cache`` can be, beside None."""


def rounded(x: Tensor) -> Tensor:
    """What int8 keeps of keys or values ``[B, G, T, D]``."""
    codes, scales = ops.quantize_per_token(x.float())
    return (codes.float() * scales).to(x.dtype)


class Int8Layer(GrowingLayer):
    """A ``GrowingLayer`` of codes. ``keys`` and ``values`` are copies of what the codes stand for.

    The native decoder layer reads the codes themselves. A token with NaN or Inf is NaN in all its channels.
    """

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Quantize new keys and values ``[B, G, T, D]``; return all that the new tokens may see.

        Raises:
            FewbitsError: If a gradient is to pass.
        """
        if torch.is_grad_enabled() and (key_states.requires_grad or value_states.requires_grad):
            raise FewbitsError(
                "kv_cache='int8': no gradient passes through the cache; call the model with use_cache=False or "
                "under torch.no_grad()"
            )
        if not self._can_write(key_states, value_states):  # then what is returned does not come from the codes
            key_states, value_states = rounded(key_states), rounded(value_states)
        return super().update(key_states, value_states, *args, **kwargs)

    def _adopted(self, tensor: Tensor | None) -> Held | None:
        if tensor is None or tensor.ndim != 4 or tensor.shape[-1] == 0:
            return None
        codes, scales = ops.quantize_per_token(tensor.detach().float())
        return Held(codes, 0, tensor.shape[2], scales[..., 0])

    def _empty(self, B: int, G: int, D: int, dtype: torch.dtype, device: torch.device) -> Held:
        codes = torch.empty(B, G, 0, D, dtype=torch.int8, device=device)
        return Held(codes, 0, 0, torch.empty(B, G, 0, device=device))

    def _can_write(self, key_states: Tensor, value_states: Tensor) -> bool:
        return key_states.shape == value_states.shape


class Int8SlidingLayer(Int8Layer, GrowingSlidingLayer):
    """The same of a layer that sees a window."""

    def _can_write(self, key_states: Tensor, value_states: Tensor) -> bool:
        return not self.record_past and super()._can_write(key_states, value_states)


_INT8 = {
    DynamicLayer: Int8Layer,
    GrowingLayer: Int8Layer,
    DynamicSlidingWindowLayer: Int8SlidingLayer,
    GrowingSlidingLayer: Int8SlidingLayer,
}


def to_int8(cache: Any) -> None:
    """Let the layers of a cache keep their tokens in int8, those that they have among them.

    Layers that have their own ways (static ones, states of linear attention) stay as they are.
    """
    if isinstance(cache, EncoderDecoderCache):
        to_int8(cache.self_attention_cache)
        to_int8(cache.cross_attention_cache)
    elif isinstance(cache, Cache) and not cache.offloading:
        if cache.layer_class_to_replicate is DynamicLayer:
            cache.layer_class_to_replicate = Int8Layer
        for layer in cache.layers:
            if type(layer) in _INT8:
                grown(layer, _INT8[type(layer)])


def check_kv_cache(kv_cache: str | None) -> None:
    """Refuse what ``kv_cache`` cannot be.

    Raises:
        FewbitsError: If it is so.
    """
    if kv_cache is not None and kv_cache not in CACHES:
        raise FewbitsError(f"kv_cache={kv_cache!r}: give 'int8', or leave it out to keep keys and values as computed")


def use_int8_cache(model: transformers.PreTrainedModel) -> None:
    """Let every cache that a model is called with keep its tokens in int8, and so those that it makes itself.

    Raises:
        FewbitsError: If the model keeps no keys and values, or states of another kind.
    """
    if not has_cache(model):
        raise FewbitsError(
            f"kv_cache='int8': a model of type {model.config.model_type!r} has no cache of keys and values that could "
            "be quantized; leave it out"
        )
    for each in {model, model.base_model}:  # not every head calls the whole base model
        before = _parameters(each).index("past_key_values")
        each.register_forward_pre_hook(partial(_quantize_cache, before), with_kwargs=True)


def has_cache(model: transformers.PreTrainedModel) -> bool:
    """Whether a model can go on from a DynamicCache: encoders have none, Mamba, RWKV and the like another state."""
    config = model.config
    decodes = config.is_encoder_decoder or getattr(config, "is_decoder", True)
    if type(config) in transformers.MODEL_FOR_MASKED_LM_MAPPING and not decodes:
        return False
    takes = getattr(model, "_supports_default_dynamic_cache", lambda: True)  # a method of models that generate
    return all("past_key_values" in _parameters(each) for each in (model, model.base_model)) and bool(takes())


def _parameters(module: nn.Module) -> list[str]:
    return list(signature(module.forward).parameters)


def _quantize_cache(
    before: int, base: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Ahead of a model's forward: its cache in int8, made here where it would make one.

    Args:
        before: How many arguments stand before the cache.
        base: The model, with its head or without.
        args: Of the call.
        kwargs: Of the call.
    """
    cache = args[before] if len(args) > before else kwargs.get("past_key_values")
    if cache is None and len(args) <= before and _makes_cache(base, kwargs.get("use_cache")):
        cache = transformers.DynamicCache(config=base.config)
        if base.config.is_encoder_decoder:
            cache = EncoderDecoderCache(transformers.DynamicCache(), transformers.DynamicCache())
        kwargs["past_key_values"] = cache
    to_int8(cache)
    return args, kwargs


def _makes_cache(base: Any, asked: bool | None) -> bool:
    return bool(base.config.use_cache if asked is None else asked) and not base.training
