"""One weight of a compressed-tensors checkpoint: its stored tensors checked, and read as codes or as values.

Letters: N output channels, K input features, G scales per channel. Stacks have more dimensions in front of N.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from fewbits.errors import FewbitsError
from fewbits.models.layouts.compressed_schemes import Scheme
from fewbits.models.layouts.exponents import powers_of_two
from fewbits.models.layouts.packed_words import unpack_words, words_in
from fewbits.models.layouts.stored_weight import SCALE_DTYPES, StoredWeight, check_dtype, check_shape, part_of
from fewbits.models.source import Source, StoredTensor
from fewbits.tensors.packing import pack_codes
from fewbits.tensors.quantized import QuantizedTensor, values_of

PACKED, SCALE, SHAPE, ZERO_POINT = "_packed", "_scale", "_shape", "_zero_point"
"""What a layout adds to the name of a weight for the tensors that it stores."""

CODES = {"I8": "int", "F8_E4M3": "float"}
"""The dtypes of codes that are not packed, and the type that a scheme has for them."""

_WORDS, _BYTES = {"I32": "int"}, {"U8": "float"}
_IN_WORDS = ("channel", "group")  # the strategies whose zero points are packed if the codes are
_BESIDE = ("_g_idx", "_global_scale")  # other ways to compute a weight from its codes


def stored_weight(source: Source, name: str, codes: StoredTensor, scheme: Scheme) -> StoredWeight:
    """Check the tensors that a weight is stored in.

    Args:
        source: The checkpoint.
        name: The weight's name in a model.
        codes: The tensor that holds its codes.
        scheme: What the configuration says of it.

    Raises:
        FewbitsError: If one is missing, has another shape or dtype, or changes what the codes mean in a way that
            fewbits does not know. The message names it.
    """
    path, tensors = source.path, source.tensors
    if len(codes.shape) < 2:
        raise FewbitsError(f"{path}: {codes.name} has shape {list(codes.shape)}, no matrix of codes; download it again")
    is_packed = codes.name.endswith(PACKED)
    packed_kinds = _BYTES if scheme.is_mxfp4 else _WORDS
    kinds = packed_kinds if is_packed else {dtype: kind for dtype, kind in CODES.items() if kind == scheme.type}
    check_dtype(codes, kinds, path)
    for suffix in _BESIDE:
        if f"{name}{suffix}" in tensors:
            raise FewbitsError(
                f"{path}: {name}{suffix}: weights that have it cannot be read; load it with transformers"
            )
    shape = _unpacked_shape(source, name, codes, scheme) if is_packed else codes.shape
    scales = _checked_scales(source, name, codes, shape, scheme)
    beside = (f"{name}{suffix}" for suffix in (SHAPE, ZERO_POINT))
    parts = (codes.name, scales.name, *(part for part in beside if part in tensors))
    precision = None if scheme.bits == 4 and shape[-1] % 2 else scheme.precision  # two codes share a byte
    reader = _Reader(name, codes.name, shape, scheme)
    load = reader.values if precision is None else reader.codes_and_scales
    return StoredWeight(name, shape, parts, precision, "BF16" if scheme.is_mxfp4 else scales.stored_as, load)


def _checked_scales(
    source: Source, name: str, codes: StoredTensor, shape: tuple[int, ...], scheme: Scheme
) -> StoredTensor:
    """The scales of a weight, checked, and its zero points too."""
    path, tensors = source.path, source.tensors
    scales = part_of(codes.name, f"{name}{SCALE}", tensors, path)
    check_dtype(scales, _BYTES if scheme.is_mxfp4 else SCALE_DTYPES, path)
    if scheme.strategy == "group" and shape[-1] % (scheme.group_size or 1):
        raise FewbitsError(
            f"{path}: {name} has {shape[-1]} input features, no multiple of the group size {scheme.group_size} in "
            "config.json; download both again"
        )
    check_shape(scales, *_scale_shapes(scheme, shape), path=path)
    if not scheme.symmetric:  # else they may be there, all zero
        zero_points = part_of(codes.name, f"{name}{ZERO_POINT}", tensors, path)
        in_words = codes.name.endswith(PACKED) and scheme.strategy in _IN_WORDS
        check_dtype(zero_points, _WORDS if in_words else CODES, path)
        *rows, N, G = scales.shape if in_words else (0, 0)
        check_shape(zero_points, (*rows, words_in(N, scheme.bits), G) if in_words else scales.shape, path=path)
    return scales


def _unpacked_shape(source: Source, name: str, packed: StoredTensor, scheme: Scheme) -> tuple[int, ...]:
    """The shape that ``X.weight_shape`` says, checked against the words; of bytes it is theirs."""
    if scheme.is_mxfp4:
        return *packed.shape[:-1], packed.shape[-1] * 2
    if scheme.type != "int":
        raise FewbitsError(f"{source.path}: {packed.name} holds words, but its scheme is of floats; download it again")
    stored = part_of(packed.name, f"{name}{SHAPE}", source.tensors, source.path)
    check_dtype(stored, {"I64": torch.int64, "I32": torch.int32}, source.path)
    check_shape(stored, (len(packed.shape),), path=source.path)
    shape = tuple(source.read(stored.name).tolist())
    *rows, K = shape
    if packed.shape != (*rows, words_in(K, scheme.bits)):
        raise FewbitsError(
            f"{source.path}: {stored.name} says {list(shape)}, but {packed.name} has shape {list(packed.shape)}, "
            f"{32 // scheme.bits} codes in a word; download it again"
        )
    return shape


def _scale_shapes(scheme: Scheme, shape: tuple[int, ...]) -> list[tuple[int, ...]]:
    """The shapes that scales may have; the first is the usual one."""
    *rows, K = shape
    if scheme.strategy == "tensor":
        return [(1,), (), (1, 1)]
    if scheme.strategy == "block":
        assert scheme.block is not None, scheme
        N_block, K_block = scheme.block
        return [(*rows[:-1], math.ceil(rows[-1] / N_block), math.ceil(K / K_block))]
    if scheme.group_size is not None:
        return [(*rows, K // scheme.group_size)]
    return [(*rows, 1)]


@dataclass(frozen=True)
class _Reader:
    """Reads one weight whose tensors have been checked."""

    name: str
    codes: str
    shape: tuple[int, ...]
    scheme: Scheme

    def codes_and_scales(self, source: Source) -> QuantizedTensor:
        """The weight as it is stored; a scale for all of it is repeated for every channel."""
        codes, rows = self._read_codes(source), self.shape[:-1]
        if self.scheme.bits == 4 and codes.dtype == torch.int8:
            codes = pack_codes(codes.view(torch.uint8) & 15)
        scales = source.read(f"{self.name}{SCALE}")
        if self.scheme.is_mxfp4:
            scales = powers_of_two(scales)
        if self.scheme.strategy == "tensor":
            scales = scales.flatten().repeat(math.prod(rows))
        assert self.scheme.precision is not None, self.scheme
        rotation = self.scheme.precision.rotation(self.shape[-1])
        return QuantizedTensor(codes, scales.reshape(*rows, -1), _format_of(self.scheme), rotation)

    def values(self, source: Source) -> Tensor:
        """The numbers that the weight stands for, in the dtype of its scales, as the package itself gives them."""
        codes = self._read_codes(source)
        format_name = "int4" if codes.dtype == torch.uint8 else _format_of(self.scheme)
        numbers = values_of(codes, "int8" if codes.dtype == torch.int8 else format_name)[..., : self.shape[-1]]
        scales = source.read(f"{self.name}{SCALE}")
        if not self.scheme.symmetric:
            numbers = numbers - self._spread(self._zero_points(source, scales.shape))
        return (numbers * self._spread(scales.float())).to(scales.dtype)

    def _read_codes(self, source: Source) -> Tensor:
        stored = source.read(self.codes)
        if self.scheme.is_mxfp4:
            return stored
        return unpack_words(stored, self.scheme.bits, self.shape[-1]) if self.codes.endswith(PACKED) else stored

    def _zero_points(self, source: Source, shape: torch.Size) -> Tensor:
        """float32, one for each scale. With packed codes they are packed too, down the channels."""
        stored = source.read(f"{self.name}{ZERO_POINT}")
        if self.codes.endswith(PACKED) and self.scheme.strategy in _IN_WORDS:
            channels = shape[-2]
            packed = unpack_words(stored.transpose(-1, -2), self.scheme.bits, channels)
            numbers = values_of(packed, "int8" if self.scheme.bits == 8 else "int4")[..., :channels]
            return numbers.transpose(-1, -2)
        return stored.float()

    def _spread(self, scales: Tensor) -> Tensor:
        """Scales, or zero points, in a shape that goes with the codes."""
        *rows, K = self.shape
        if self.scheme.strategy == "tensor":
            return scales.reshape(())
        if self.scheme.strategy != "block":
            scales = scales.reshape(*rows, -1)
            return scales.repeat_interleave(K // scales.shape[-1], -1)
        assert self.scheme.block is not None, self.scheme
        N_block, K_block = self.scheme.block
        return scales.repeat_interleave(N_block, -2).repeat_interleave(K_block, -1)[..., : rows[-1], :K]


def _format_of(scheme: Scheme) -> str:
    if scheme.is_mxfp4:
        return "e2m1fn"
    return "e4m3fn" if scheme.type == "float" else "int8" if scheme.bits == 8 else "int4"
