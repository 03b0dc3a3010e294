"""How many bytes a model takes, from numbers alone: the arithmetic of the plan and of the explore page.

Letters: N output channels, K input features, G scales per channel, D channels of a head.

    a quantized weight       codes in panels of 32 channels, as the CPU's kernels read them, and scales
    an output head           int8, a copy of its own where it is tied to the embedding
    an embedding             the dtype that the checkpoint keeps, 16 bits as a rule
    everything else          float32 beside quantized layers, in which is computed between them

A model in a cast precision has the cast's dtype throughout.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from fewbits.formats import Format
from fewbits.formats.precisions import STORED_PRECISIONS, StoredPrecision

HEAD = next(stored for stored in STORED_PRECISIONS if stored.name == "int8")
"""What an output head is kept in beside layers of any quantized precision."""

COMPUTE_BYTES = 4
"""Bytes of a number between quantized layers, and so of a key or value: float32."""

SCALE_BYTES = 4
"""Bytes of the scale that a head and token of an int8 cache has: float32."""

_CHANNELS, _WORD = 32, 4  # of a panel: kernels.packing and kernels.panels, which need torch


@dataclass(frozen=True)
class Matrix:
    """A weight that a quantized layer can take, and others of its shape.

    Attributes:
        N: Output channels.
        K: Input features.
        count: How many there are; experts one by one.
        read: How many of them a token reads: of experts those that work on it.
        stored: Their precision, where it is not that of the others.
    """

    N: int
    K: int
    count: int = 1
    read: float = 1
    stored: StoredPrecision | None = None

    @property
    def numbers(self) -> int:
        """Parameters of all of them."""
        return self.N * self.K * self.count


@dataclass(frozen=True)
class Size:
    """What a model consists of.

    Attributes:
        layers: Weights that are quantized.
        head: The output head, if there is one that takes part in a step.
        tied: Whether the head is the embedding.
        table: Parameters of embeddings, of which a step looks up rows.
        rest: All other parameters: norms, biases, layers that stay in float.
        rest_read: Of them, those that a token reads.
        wide: Parameters that stay in float32 where the model is cast to 16 bits.
        buffers: Bytes of what is no parameter, in any precision.
    """

    layers: tuple[Matrix, ...]
    head: Matrix | None
    tied: bool
    table: int
    rest: int
    rest_read: int
    wide: int = 0
    buffers: int = 0

    @property
    def parameters(self) -> int:
        """All of them, tied ones once."""
        head = 0 if self.head is None or self.tied else self.head.numbers
        return sum(matrix.numbers for matrix in self.layers) + head + self.table + self.rest


@dataclass(frozen=True)
class CacheLayer:
    """Keys and values of layers that are alike.

    Attributes:
        keys: Numbers of a token's keys in a layer.
        values: Of its values.
        heads: Key and value heads, each with its scale in an int8 cache.
        window: Tokens that such a layer keeps; None: all.
        count: How many layers.
    """

    keys: int
    values: int
    heads: int
    window: int | None = None
    count: int = 1

    def numbers(self, tokens: int) -> int:
        """Keys and values that are kept of a text of so many tokens."""
        return self.count * self._seen(tokens) * (self.keys + self.values)

    def scales(self, tokens: int) -> int:
        """The scales that they have in an int8 cache."""
        return self.count * self._seen(tokens) * 2 * self.heads

    def _seen(self, tokens: int) -> int:
        return tokens if self.window is None else min(tokens, self.window)


def quantized_bytes(stored: StoredPrecision, N: int, K: int, kept_bytes: int) -> int:
    """Bytes of one quantized weight in memory: its panels and scales.

    Args:
        stored: The precision, its groups fitted to the model.
        N: Output channels.
        K: Input features.
        kept_bytes: Of a scale as it is stored: 2 or 4.
    """
    bits, panels = Format.named(stored.weights).bits, -(-N // _CHANNELS)
    if stored.weights == stored.activations == "int8" and stored.group_size is None:
        sums = 1  # a row of the panel: what the codes of a channel add up to
        return panels * (sums + -(-K // _WORD)) * _WORD * _CHANNELS + 4 * N
    row, G = K * bits // 8, 1 if stored.group_size is None else K // stored.group_size
    scale_bytes = 2 if stored.weights == "e2m1fn" else kept_bytes  # powers of two are kept in bfloat16
    if row % (G * _WORD) == 0 or (G == 1 and bits == 8):
        return panels * _CHANNELS * (-(-row // _WORD) * _WORD + G * scale_bytes)
    return N * (row + G * scale_bytes)


def weight_bytes(size: Size, stored: StoredPrecision, kept_bytes: int = 2) -> int:
    """Bytes of a model's weights in memory.

    Args:
        size: Its weights.
        stored: The precision, its groups fitted to the model.
        kept_bytes: Of a number that the checkpoint does not quantize.
    """
    if stored.cast:
        width = Format.named(stored.weights).bits // 8
        return size.parameters * width + size.wide * (COMPUTE_BYTES - width) + size.buffers
    layers = sum(matrix.count * _bytes_of(matrix, stored, kept_bytes) for matrix in size.layers)
    head = 0 if size.head is None else quantized_bytes(HEAD, size.head.N, size.head.K, kept_bytes)
    return layers + head + size.table * kept_bytes + size.rest * COMPUTE_BYTES + size.buffers


def read_bytes(size: Size, stored: StoredPrecision, kept_bytes: int = 2) -> int:
    """Bytes of weights that a written token reads: all but embeddings, and of experts those that work on it."""
    head = size.head.numbers if size.head is not None else 0
    if stored.cast:
        numbers = sum(matrix.N * matrix.K * matrix.read for matrix in size.layers) + head + size.rest_read
        return int(numbers * Format.named(stored.weights).bits / 8)
    layers = sum(matrix.read * _bytes_of(matrix, stored, kept_bytes) for matrix in size.layers)
    of_head = 0 if size.head is None else quantized_bytes(HEAD, size.head.N, size.head.K, kept_bytes)
    return int(layers + of_head + size.rest_read * COMPUTE_BYTES)


def cache_bytes(layers: Sequence[CacheLayer], tokens: int, stored: StoredPrecision, *, int8: bool = False) -> int:
    """Bytes of the keys and values of one text.

    Args:
        layers: Those of the model that keep any.
        tokens: Of the text.
        stored: The precision of the model: a cast keeps them in its dtype, the others in float32.
        int8: Whether they are kept in int8, ``kv_cache="int8"``.
    """
    numbers = sum(layer.numbers(tokens) for layer in layers)
    if int8:
        return numbers + SCALE_BYTES * sum(layer.scales(tokens) for layer in layers)
    return numbers * computed_bytes(stored)


def computed_bytes(stored: StoredPrecision) -> int:
    """Bytes of a number between layers."""
    return Format.named(stored.weights).bits // 8 if stored.cast else COMPUTE_BYTES


def bits_per_weight(size: Size, stored: StoredPrecision, kept_bytes: int = 2) -> float:
    """Bits of codes and scales that a weight of a quantized layer has on disk; of a cast, those of its format."""
    weights = sum(matrix.numbers for matrix in size.layers)
    if stored.cast or not weights:
        return Format.named(stored.weights).bits
    bits = sum(matrix.count * _stored_bits(matrix, matrix.stored or stored, kept_bytes) for matrix in size.layers)
    return bits / weights


def _stored_bits(matrix: Matrix, stored: StoredPrecision, kept_bytes: int) -> int:
    scale_bits = 8 if stored.weights == "e2m1fn" else 8 * kept_bytes  # a power of two is one byte
    G = 1 if stored.group_size is None else matrix.K // stored.group_size
    return matrix.N * (matrix.K * Format.named(stored.weights).bits + G * scale_bits)


def _bytes_of(matrix: Matrix, stored: StoredPrecision, kept_bytes: int) -> int:
    return quantized_bytes(matrix.stored or stored, matrix.N, matrix.K, kept_bytes)
