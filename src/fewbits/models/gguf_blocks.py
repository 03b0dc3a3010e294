"""Encode rows of numbers as GGUF's blocks: Q8_0, Q4_0 and Q4_1.

A block is 32 elements of a row that share a scale d, stored in half precision before the codes:

    Q8_0, 34 bytes   d | 32 x int8                          x = d * code
    Q4_0, 18 bytes   d | 16 x (code j, code j + 16 << 4)    x = d * (code - 8)
    Q4_1, 20 bytes   d | m | 16 x (…)                       x = d * code + m

Codes are found with the scale in float32, before it is rounded to half precision, as ggml does.
Source: https://github.com/ggml-org/ggml, `src/ggml-quants.c`, `quantize_row_q8_0_ref`, `…q4_0_ref`, `…q4_1_ref`.

Shapes: R rows, K elements in a row, B blocks in a chunk.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from torch import Tensor

from fewbits.errors import FewbitsError

BLOCK = 32  # elements, of every type here
# Elements encoded at once: enough that torch splits each step over its threads, and a scratch of a few MB only.
_CHUNK = 1 << 18
# The largest float32 below one half: q plus this, cut off, is q rounded with halves away from zero, for every q that
# is not so large as to be whole. With one half itself, 0.49999997 would become 1.
_HALF = 0.5 - 2**-25


def encode_blocks(weight: Tensor, kind: GGMLQuantizationType, *, first_row: int = 0) -> Tensor:
    """The blocks of a matrix, byte for byte those of ``gguf.quantize``; of Q4_1, a scale or minimum of zero is +0.

    Args:
        weight: ``[R, K]`` in any floating dtype, on the CPU; K is a multiple of 32.
        kind: Q8_0, Q4_0 or Q4_1.
        first_row: Where in its matrix ``weight`` begins, for the message.

    Returns:
        uint8 ``[R, K / 32 * bytes of a block]``.

    Raises:
        FewbitsError: K is not a multiple of 32; a row holds NaN or Inf, or a number so large that its scale is beyond
            half precision. The message names the row.
    """
    rows, width = weight.shape
    if width % BLOCK:
        raise FewbitsError(f"rows of {width} elements are not whole {kind.name} blocks of {BLOCK}; store them as F16")
    encode = _ENCODERS[kind]
    block_bytes = GGML_QUANT_SIZES[kind][1]
    out = torch.empty(rows, width // BLOCK * block_bytes, dtype=torch.uint8)
    step = max(1, _CHUNK // max(width, 1))
    for first in range(0, rows, step):
        chunk = weight[first : first + step]
        blocks = out[first : first + step].view(-1, block_bytes)
        if not encode(chunk.reshape(-1, BLOCK).float(), blocks):
            raise FewbitsError(_why_refused(chunk, first_row + first, kind))
    return out


def _encode_q8_0(x: Tensor, out: Tensor) -> bool:
    """Encode ``x`` ``[B, 32]`` into ``out`` ``[B, 34]``; whether every scale is finite."""
    low, high = x.aminmax(dim=1, keepdim=True)
    scale = torch.maximum(high, -low).abs_().div_(127)  # abs for the sign of zero
    codes = x * _inverse(scale).nan_to_num_(posinf=0)  # where 1/d overflows, d is stored as 0
    codes += torch.copysign(torch.tensor(_HALF), codes)
    out[:, 2:].view(torch.int8).copy_(codes)  # which cuts off
    return _store_half(out, 0, scale)


def _encode_q4_0(x: Tensor, out: Tensor) -> bool:
    """Encode ``x`` ``[B, 32]`` into ``out`` ``[B, 18]``; whether every scale is finite."""
    low, high = x.aminmax(dim=1, keepdim=True)
    extreme = torch.where(-low > high, low, high)
    tied = (-low == high).squeeze(1)
    if tied.any():  # the first of the largest magnitudes counts, whatever its sign, that of a zero included
        some = x[tied]
        extreme[tied] = some.gather(1, some.abs().argmax(dim=1, keepdim=True))
    scale = extreme.div_(-8)
    _store_nibbles(out, 2, (x * _inverse(scale)).add_(8.5), scale)
    return _store_half(out, 0, scale)


def _encode_q4_1(x: Tensor, out: Tensor) -> bool:
    """Encode ``x`` ``[B, 32]`` into ``out`` ``[B, 20]``; whether every scale and minimum is finite."""
    low, high = x.aminmax(dim=1, keepdim=True)
    low += 0.0  # no -0.0, which would depend on the order in which the minimum was found
    scale = (high - low).div_(15).abs_()
    _store_nibbles(out, 4, (x - low).mul_(_inverse(scale)).add_(0.5), scale)
    finite = _store_half(out, 0, scale)
    return _store_half(out, 2, low) and finite


_ENCODERS: dict[GGMLQuantizationType, Callable[[Tensor, Tensor], bool]] = {
    GGMLQuantizationType.Q8_0: _encode_q8_0,
    GGMLQuantizationType.Q4_0: _encode_q4_0,
    GGMLQuantizationType.Q4_1: _encode_q4_1,
}


def _inverse(scale: Tensor) -> Tensor:
    """1 / scale ``[B, 1]``, and 0 for 0."""
    return torch.where(scale == 0, 0.0, scale.reciprocal())


def _store_half(out: Tensor, offset: int, values: Tensor) -> bool:
    """Put ``values`` ``[B, 1]`` in half precision at a byte of each block; whether all are finite."""
    half = values.half()
    out[:, offset : offset + 2] = half.view(torch.uint8)
    return bool(half.isfinite().all())


def _store_nibbles(out: Tensor, offset: int, codes: Tensor, scale: Tensor) -> None:
    """Put the whole part of ``codes`` ``[B, 32]``, 0 to 15, at a byte of each block: code j low, j + 16 high."""
    overflows = scale.reciprocal().isinf() & (scale != 0)
    if overflows.any():  # the scale is stored as 0, so the code is no matter, but infinity and NaN have none
        codes.masked_fill_(overflows, 0)
    whole = codes.clamp_(0, 15).to(torch.uint8)
    torch.bitwise_or(whole[:, :16], whole[:, 16:] << 4, out=out[:, offset:])


def _why_refused(chunk: Tensor, first: int, kind: GGMLQuantizationType) -> str:
    bad = (~chunk.isfinite()).any(dim=1).nonzero()
    if len(bad):
        row = int(bad[0])
        value = chunk[row][~chunk[row].isfinite()][0].item()
        return f"row {first + row} holds {value}, which no {kind.name} block can hold; mend the weights"
    row = int(chunk.abs().amax(dim=1).argmax())
    return (
        f"row {first + row} holds {chunk[row].abs().max().item():.6g}, for which the scale of a {kind.name} block is "
        f"beyond half precision ({torch.finfo(torch.float16).max:.6g}); use bf16 or fp32"
    )
