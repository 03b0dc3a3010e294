"""Rotation by blocks in one launch: the butterflies of ``kernels.rotation`` in registers, with the same bits."""

from __future__ import annotations

import math

import triton
import triton.language as tl
from torch import Tensor

from fewbits.kernels.cuda.device import on

_FEATURES = 2048  # that a program holds


def rotate(out: Tensor, x: Tensor, block: int) -> Tensor:
    """Fill ``out``, contiguous and of the shape of x, with what ``fewbits.kernels.rotation.rotate`` means."""
    count, rows = x.numel() // block, _FEATURES // block
    if count:
        with on(x.device):
            _rotate[(triton.cdiv(count, rows),)](
                x.contiguous(), out, count, 1 / math.sqrt(block), ROWS=rows, BLOCK=block, STAGES=block.bit_length() - 1
            )
    return out


@triton.jit
def _rotate(x, out, count, factor, ROWS: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr):
    place = tl.program_id(0).to(tl.int64) * (ROWS * BLOCK) + tl.arange(0, ROWS * BLOCK)
    inside = place // BLOCK < count
    y = tl.load(x + place, mask=inside, other=0.0)
    for stage in tl.static_range(STAGES):
        pairs = tl.reshape(y, (ROWS * BLOCK >> stage + 1, 2, 1 << stage))
        first, second = tl.split(tl.permute(pairs, (0, 2, 1)))
        mixed = tl.join(first + second, first - second)
        y = tl.reshape(tl.permute(mixed, (0, 2, 1)), (ROWS * BLOCK,))
    tl.store(out + place, y * factor, mask=inside)
