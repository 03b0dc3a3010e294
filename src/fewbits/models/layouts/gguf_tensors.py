"""The tensors of a GGUF file: what is planned for each, and its bytes, made a few rows at a time."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from gguf import GGMLQuantizationType
from torch import Tensor

from fewbits.errors import FewbitsError
from fewbits.models.gguf_blocks import encode_blocks
from fewbits.models.gguf_config import ARCHITECTURES, Architecture
from fewbits.models.layouts.gguf_keys import family_of, frequency_factors
from fewbits.models.precision import cast_weight
from fewbits.models.source import Source

PLAIN = {
    GGMLQuantizationType.F32: torch.float32,
    GGMLQuantizationType.F16: torch.float16,
    GGMLQuantizationType.BF16: torch.bfloat16,
}
_AT_ONCE = 1 << 20  # elements read and encoded at once


@dataclass(frozen=True)
class GgufRow:
    """One tensor of the file.

    Attributes:
        tensor: Its Hugging Face name; None for one that is computed from the configuration.
        name: Its name in the file.
        shape: Its shape, rows first.
        type: Its type.
        nbytes: Bytes it takes.
        reason: Why it does not have the type of the file; None if it does.
    """

    tensor: str | None
    name: str
    shape: tuple[int, ...]
    type: GGMLQuantizationType
    nbytes: int
    reason: str | None


def encoded_tensor(source: Source, row: GgufRow) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
    """The bytes of a tensor, rows first.

    Raises:
        FewbitsError: A value is NaN or Inf, or beyond the type. The message names tensor and row.
    """
    if row.tensor is None:
        factors = frequency_factors(source.config)
        assert factors is not None, row
        return factors.view(np.uint8)
    where, count = f"{source.path}: {row.tensor}", row.shape[0]
    out = torch.empty(count, row.nbytes // count, dtype=torch.uint8)
    head = _rows_per_head(source, row)
    step = max(1, _AT_ONCE // (math.prod(row.shape[1:]) * head)) * head
    offset = _architecture(source).norm_offset if row.name.endswith("_norm.weight") else 0.0
    for first in range(0, count, step):
        values = source.read_rows(row.tensor, first, min(first + step, count))
        _check_finite(values, where, first)
        encoded = _encode(values.float() + offset if offset else values, row.type, where, first)
        out[first : first + step] = _pairs(encoded, head)
    return out.numpy()


def _encode(values: Tensor, kind: GGMLQuantizationType, where: str, first: int) -> Tensor:
    """Bytes ``[rows, bytes of a row]`` of values ``[rows, …]``, of which the first is row ``first`` of its tensor."""
    dtype = PLAIN.get(kind)
    if dtype is not None:
        return cast_weight(where, values, dtype).contiguous().view(len(values), -1).view(torch.uint8)
    try:
        return encode_blocks(values, kind, first_row=first)
    except FewbitsError as error:
        raise FewbitsError(f"{where}: {error}") from None


def _check_finite(values: Tensor, where: str, first: int) -> None:
    if all(extreme.isfinite() for extreme in values.aminmax()):  # takes no memory
        return
    row = int((~values.isfinite()).view(len(values), -1).any(dim=1).nonzero()[0])
    raise FewbitsError(f"{where}: row {first + row} holds NaN or Inf; mend the weights")


def _architecture(source: Source) -> Architecture:
    return ARCHITECTURES[family_of(source.config, source.path).architecture]


def _rows_per_head(source: Source, row: GgufRow) -> int:
    """Rows that are permuted among themselves: the size of a head, or 1 where nothing is permuted."""
    if not any(part in row.name for part in _architecture(source).permuted):
        return 1
    config = source.config
    heads = config.num_attention_heads if ".attn_q." in row.name else config.num_key_value_heads
    return row.shape[0] // int(heads)


def _pairs(rows: Tensor, head: int) -> Tensor:
    """Rows of heads from Hugging Face's order (x0 x1 … y0 y1 …) to llama.cpp's (x0 y0 x1 y1 …, rotated in pairs)."""
    if head == 1:
        return rows
    return rows.view(-1, 2, head // 2, rows.shape[1]).transpose(1, 2).reshape(rows.shape)
