"""A cache of keys and values that grows in place, where transformers' own is copied whole for every token.

    buffer  [B, G, capacity, D]
            |  forgotten  |      keys       |   room   |
            0             start             end        capacity

Letters: B texts, G key and value heads, T new tokens, D channels of a head.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer, DynamicSlidingWindowLayer

_LEAST_ROOM = 256  # tokens: what most answers need at least


@dataclass
class _Held:
    """Keys or values: a buffer, and which of its positions are held."""

    buffer: Tensor
    start: int
    end: int

    def view(self) -> Tensor:
        return self.buffer[:, :, self.start : self.end]

    def moved(self, capacity: int, shape: tuple[int, int, int]) -> Tensor:
        """What is held, at the beginning of a larger buffer."""
        B, G, D = shape
        new = self.buffer.new_empty(B, G, capacity, D)
        new[:, :, : self.end - self.start] = self.view()
        return new


class GrowingLayer(DynamicLayer):  # type: ignore[misc]  # transformers is not typed
    """A ``DynamicLayer`` with room behind its keys and values: a new token is written there, nothing else is copied.

    Where the room is used up the buffers grow by half. What ``keys`` and ``values`` give are views, which later tokens
    do not change; ``crop`` frees room that the next tokens overwrite.
    """

    is_initialized: bool
    _keys: _Held | None = None
    _values: _Held | None = None

    @property
    def keys(self) -> Tensor | None:
        """``[B, G, tokens, D]``."""
        return self._view(self._keys)

    @keys.setter
    def keys(self, keys: Tensor | None) -> None:
        self._keys = _adopted(keys)

    @property
    def values(self) -> Tensor | None:
        """``[B, G, tokens, D]``."""
        return self._view(self._values)

    @values.setter
    def values(self, values: Tensor | None) -> None:
        self._values = _adopted(values)

    def make_room(self, B: int, G: int, T: int, D: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, int, int]:
        """See that ``T`` more tokens fit.

        Returns:
            The buffers of keys and values, and where in them the tokens that are visible now begin and end.
        """
        keys, values = self._keys, self._values
        if keys is None or values is None:
            if not self.is_initialized:
                self.dtype, self.device, self.is_initialized = dtype, torch.device("cpu"), True
            empty = torch.empty(B, G, 0, D, dtype=dtype)
            keys = values = _Held(empty, 0, 0)
        if keys.end + T > keys.buffer.shape[2] or values.end + T > values.buffer.shape[2] or keys.end != values.end:
            tokens = keys.end - keys.start
            capacity = tokens + T + max(_LEAST_ROOM, (tokens + T) // 2)
            keys = self._keys = _Held(keys.moved(capacity, (B, G, D)), 0, tokens)
            values = self._values = _Held(values.moved(capacity, (B, G, D)), 0, tokens)
        return keys.buffer, values.buffer, keys.start, keys.end

    def grow(self, T: int) -> None:
        """Count ``T`` tokens that have been written behind the others."""
        for held in (self._keys, self._values):
            if held is not None:
                held.end += T

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write new keys and values ``[B, G, T, D]`` behind the others; return all that the new tokens may see."""
        if not self._can_write(key_states, value_states):
            seen: tuple[Tensor, Tensor] = super().update(key_states, value_states, *args, **kwargs)
            return seen
        B, G, T, D = key_states.shape
        keys, values, start, end = self.make_room(B, G, T, D, key_states.dtype)
        keys[:, :, end : end + T] = key_states
        values[:, :, end : end + T] = value_states
        self.grow(T)
        return keys[:, :, start : end + T], values[:, :, start : end + T]

    def get_seq_length(self) -> int:
        """Tokens so far."""
        return 0 if self._keys is None else self._keys.end - self._keys.start

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last ``-tokens_to_remove`` tokens."""
        if tokens_to_remove > 0:
            super().crop(tokens_to_remove)  # which refuses
        for held in (self._keys, self._values):
            if held is not None:
                held.end = max(held.start, held.end + tokens_to_remove)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Put other texts in the places of these, as beam search does; the room stays."""
        for held in (self._keys, self._values):
            if held is not None:
                chosen = _Held(held.view().index_select(0, beam_idx.to(held.buffer.device)), 0, held.end - held.start)
                B, G, _, D = chosen.buffer.shape
                held.buffer = chosen.moved(held.buffer.shape[2], (B, G, D))
                held.start, held.end = 0, chosen.end

    def _view(self, held: _Held | None) -> Tensor | None:
        if held is None:
            return torch.tensor([], dtype=self.dtype, device=self.device) if self.is_initialized else None
        return held.view()

    def _can_write(self, key_states: Tensor, value_states: Tensor) -> bool:
        """Whether states can be written into buffers: else they are concatenated, as transformers does."""
        graded = torch.is_grad_enabled() and (key_states.requires_grad or value_states.requires_grad)
        same = key_states.shape == value_states.shape and key_states.dtype == value_states.dtype
        fits = self._keys is None or self._keys.buffer.dtype == key_states.dtype
        return key_states.device.type == value_states.device.type == "cpu" and same and fits and not graded


def _adopted(tensor: Tensor | None) -> _Held | None:
    """A tensor from elsewhere is a buffer without room: nothing is ever written behind it."""
    return None if tensor is None or tensor.ndim != 4 else _Held(tensor, 0, tensor.shape[2])


class GrowingSlidingLayer(GrowingLayer, DynamicSlidingWindowLayer):  # type: ignore[misc]
    """The same of a layer that sees a window: what has left it is forgotten when the buffers grow."""

    def grow(self, T: int) -> None:
        """Count ``T`` tokens that have been written, and forget what the next one cannot see."""
        super().grow(T)
        self.cumulative_length += T
        for held in (self._keys, self._values):
            if held is not None:
                held.start = max(held.start, held.end - self.sliding_window + 1)

    def get_seq_length(self) -> int:
        """Tokens so far, those that are forgotten among them."""
        return int(self.cumulative_length)

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last ``-tokens_to_remove`` tokens, as long as no earlier one has been forgotten."""
        DynamicSlidingWindowLayer.crop(self, tokens_to_remove)

    def _can_write(self, key_states: Tensor, value_states: Tensor) -> bool:
        return not self.record_past and super()._can_write(key_states, value_states)


def growing_layer(cache: Cache | None, index: int) -> GrowingLayer | None:
    """The cache's layer as one that grows in place; None if it is of a kind that has its own ways."""
    if cache is None or cache.offloading:
        return None
    if len(cache.layers) <= index:
        if cache.layer_class_to_replicate is not DynamicLayer:
            return None
        cache.layers.extend(DynamicLayer() for _ in range(index + 1 - len(cache.layers)))
    layer = cache.layers[index]
    if isinstance(layer, GrowingLayer):
        recording = isinstance(layer, GrowingSlidingLayer) and layer.record_past
        return None if recording else layer
    kind = _GROWING.get(type(layer))
    if kind is None or getattr(layer, "record_past", False):
        return None
    keys, values = layer.__dict__.pop("keys"), layer.__dict__.pop("values")
    layer.__class__ = kind  # it stays the same object, of a subclass of what it was
    layer.keys, layer.values = keys, values
    return layer  # type: ignore[no-any-return]


_GROWING = {DynamicLayer: GrowingLayer, DynamicSlidingWindowLayer: GrowingSlidingLayer}
