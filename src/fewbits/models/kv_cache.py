"""A cache of keys and values that grows in place, where transformers' own is copied whole for every token.

    buffer  [B, G, capacity, D]
            |  forgotten  |      keys       |   room   |
            0             start             end        capacity

Letters: B texts, G key and value heads, T new tokens, D channels of a head.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer, DynamicSlidingWindowLayer

from fewbits.kernels import ops
from fewbits.models.allocation import empty_pages

_LEAST_ROOM = 256  # tokens: what most answers need at least


@dataclass
class Held:
    """Keys or values: a buffer, and which of its positions are held.

    Attributes:
        buffer: ``[B, G, capacity, D]``, numbers or int8 codes.
        start: The first position that is held.
        end: The one behind the last.
        scales: Of codes, float32 ``[B, G, capacity]``; None of numbers.
    """

    buffer: Tensor
    start: int
    end: int
    scales: Tensor | None = None

    def view(self, dtype: torch.dtype) -> Tensor:
        """What is held, ``[B, G, tokens, D]``: a view, or a copy in ``dtype`` of what codes stand for."""
        held = self.buffer[:, :, self.start : self.end]
        if self.scales is None:
            return held
        return (held.float() * self.scales[:, :, self.start : self.end, None]).to(dtype)

    def place(self) -> tuple[int, int, int, int, int]:
        """For the kernels: the first token's address and its scale's (0: none), strides of texts, heads and tokens."""
        buffer, scales = self.buffer, self.scales
        first = buffer.data_ptr() + self.start * buffer.stride(2) * buffer.itemsize
        of_scales = 0 if scales is None else scales.data_ptr() + self.start * scales.itemsize
        return first, of_scales, buffer.stride(0), buffer.stride(1), buffer.stride(2)

    def write(self, states: Tensor) -> None:
        """Put new tokens ``[B, G, T, D]`` into the room behind the others; ``end`` does not move."""
        places = slice(self.end, self.end + states.shape[2])
        if self.scales is None:
            self.buffer[:, :, places] = states
        else:
            codes, scales = ops.quantize_per_token(states.float())
            self.buffer[:, :, places], self.scales[:, :, places] = codes, scales[..., 0]

    def moved(self, capacity: int, texts: Tensor | None = None) -> Held:
        """What is held, or these texts of it, at the beginning of another buffer."""
        tensors = []
        for old in (self.buffer, self.scales):
            if old is None:
                continue
            held = old[:, :, self.start : self.end]
            held = held if texts is None else held.index_select(0, texts.to(old.device))
            # so that the room takes no memory before it is written
            new = empty_pages((held.shape[0], old.shape[1], capacity, *old.shape[3:]), old)
            new[:, :, : self.end - self.start] = held
            tensors.append(new)
        return Held(tensors[0], 0, self.end - self.start, *tensors[1:])


class GrowingLayer(DynamicLayer):  # type: ignore[misc]  # transformers is not typed
    """A ``DynamicLayer`` with room behind its keys and values: a new token is written there, nothing else is copied.

    Where the room is used up the buffers grow by half. What ``keys`` and ``values`` give are views, which later tokens
    do not change; ``crop`` frees room that the next tokens overwrite.
    """

    is_initialized: bool
    _keys: Held | None = None
    _values: Held | None = None

    @property
    def keys(self) -> Tensor | None:
        """``[B, G, tokens, D]``."""
        return self._view(self._keys)

    @keys.setter
    def keys(self, keys: Tensor | None) -> None:
        self._keys = self._adopted(keys)

    @property
    def values(self) -> Tensor | None:
        """``[B, G, tokens, D]``."""
        return self._view(self._values)

    @values.setter
    def values(self, values: Tensor | None) -> None:
        self._values = self._adopted(values)

    @property
    def nbytes(self) -> int:
        """Bytes of the buffers, the room in them included."""
        held = [each for each in (self._keys, self._values) if each is not None]
        return sum(each.buffer.nbytes + (0 if each.scales is None else each.scales.nbytes) for each in held)

    def make_room(self, B: int, G: int, T: int, D: int, dtype: torch.dtype, device: torch.device) -> tuple[Held, Held]:
        """See that ``T`` more tokens fit behind the keys and values, which are returned."""
        if not self.is_initialized:
            self.dtype, self.device, self.is_initialized = dtype, device, True
        keys, values = self._keys, self._values
        if keys is None or values is None:
            keys, values = (self._empty(B, G, D, dtype, device) for _ in range(2))
        if keys.end + T > keys.buffer.shape[2] or values.end + T > values.buffer.shape[2] or keys.end != values.end:
            tokens = keys.end - keys.start
            capacity = tokens + T + max(_LEAST_ROOM, (tokens + T) // 2)
            keys, values = keys.moved(capacity), values.moved(capacity)
        self._keys, self._values = keys, values
        return keys, values

    def takes(self, dtype: torch.dtype) -> bool:
        """Whether new tokens of ``dtype`` can be written behind those that are here."""
        return self._keys is None or self._keys.scales is not None or self._keys.buffer.dtype == dtype

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
        keys, values = self.make_room(B, G, T, D, key_states.dtype, key_states.device)
        keys.write(key_states)
        values.write(value_states)
        all_keys, all_values = (replace(held, end=held.end + T) for held in (keys, values))
        self.grow(T)  # after which a layer with a window may hold less
        return all_keys.view(key_states.dtype), all_values.view(key_states.dtype)

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
        if self._keys is not None and self._values is not None:
            self._keys = self._keys.moved(self._keys.buffer.shape[2], beam_idx)
            self._values = self._values.moved(self._values.buffer.shape[2], beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Put ``repeats`` copies of each text in its place."""
        if self._keys is not None:
            self.reorder_cache(torch.arange(self._keys.buffer.shape[0]).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these texts only."""
        if self._keys is not None:
            self.reorder_cache(torch.arange(self._keys.buffer.shape[0])[torch.as_tensor(indices).cpu()])

    def _view(self, held: Held | None) -> Tensor | None:
        if held is None:
            return torch.tensor([], dtype=self.dtype, device=self.device) if self.is_initialized else None
        return held.view(self.dtype)

    def _adopted(self, tensor: Tensor | None) -> Held | None:
        """A tensor from elsewhere is a buffer without room: nothing is ever written behind it."""
        return None if tensor is None or tensor.ndim != 4 else Held(tensor, 0, tensor.shape[2])

    def _empty(self, B: int, G: int, D: int, dtype: torch.dtype, device: torch.device) -> Held:
        return Held(torch.empty(B, G, 0, D, dtype=dtype, device=device), 0, 0)

    def _can_write(self, key_states: Tensor, value_states: Tensor) -> bool:
        """Whether states can be written into buffers: else they are concatenated, as transformers does."""
        graded = torch.is_grad_enabled() and (key_states.requires_grad or value_states.requires_grad)
        same = key_states.shape == value_states.shape and key_states.dtype == value_states.dtype
        on_cpu = key_states.device.type == value_states.device.type == "cpu"
        return on_cpu and same and self.takes(key_states.dtype) and not graded


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
        kind = cache.layer_class_to_replicate
        if kind is not DynamicLayer and not (isinstance(kind, type) and issubclass(kind, GrowingLayer)):
            return None
        cache.layers.extend(kind() for _ in range(index + 1 - len(cache.layers)))
    layer = cache.layers[index]
    if isinstance(layer, GrowingLayer):
        recording = isinstance(layer, GrowingSlidingLayer) and layer.record_past
        return None if recording else layer
    kind = _GROWING.get(type(layer))
    if kind is None or getattr(layer, "record_past", False):
        return None
    return grown(layer, kind)


def grown(layer: Any, kind: type[GrowingLayer]) -> GrowingLayer:
    """A cache's layer as another kind, with the tokens that it has; it stays the same object."""
    keys, values = layer.keys, layer.values
    layer.__dict__.pop("keys", None)
    layer.__dict__.pop("values", None)
    layer.__class__ = kind
    layer.keys, layer.values = keys, values
    return layer  # type: ignore[no-any-return]


_GROWING = {DynamicLayer: GrowingLayer, DynamicSlidingWindowLayer: GrowingSlidingLayer}
