"""Codes of a weight, as they are stored, to numbers in registers; and a whole weight to 16 or 32 bits.

Letters: N output channels, K input features, B bytes and G scales of a channel.
"""

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from fewbits.kernels.panels import table

INT8, E4M3, INT4, TABLE = (tl.constexpr(kind) for kind in range(4))
"""How codes become numbers; 4-bit formats other than int4 have a table of 16."""


def kind_of(format_name: str) -> int:
    """Which of the kinds a format is."""
    kinds = {"int8": INT8, "e4m3fn": E4M3, "int4": INT4}
    return int(kinds.get(format_name, TABLE).value)


@cache
def codebook(format_name: str, device: torch.device) -> Tensor:
    """The 16 values of a 4-bit format, float32. Made once a device: no copy from the host within a CUDA graph."""
    return torch.tensor(table(format_name) or (0.0,), dtype=torch.float32, device=device)


def dequantize(codes: Tensor, scales: Tensor, format_name: str, dtype: torch.dtype) -> Tensor:
    """The weight ``[N, K]`` that codes, int8 ``[N, B]``, and scales ``[N, G]`` stand for, rounded once."""
    N, B = codes.shape
    kind, G = kind_of(format_name), scales.shape[1]
    K = B * 2 if kind >= INT4.value else B
    out = torch.empty((N, K), dtype=dtype, device=codes.device)
    block = min(1024, triton.next_power_of_2(B))
    _dequantize[(N, triton.cdiv(B, block))](
        codes, scales, codebook(format_name, codes.device), out, B, G, B // G, KIND=kind, BLOCK=block
    )
    return out


@triton.jit
def _dequantize(codes, scales, values, out, B, G, group, KIND: tl.constexpr, BLOCK: tl.constexpr):
    n = tl.program_id(0).to(tl.int64)
    b = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    code = tl.load(codes + n * B + b, mask=b < B, other=0)
    scale = tl.load(scales + n * G + b // group, mask=b < B, other=0.0).to(tl.float32)
    element = out.dtype.element_ty
    if KIND >= INT4:
        low = low_half(code, values, KIND, tl.float32) * scale
        high = high_half(code, values, KIND, tl.float32) * scale
        tl.store(out + n * B * 2 + b * 2, low.to(element), mask=b < B)
        tl.store(out + n * B * 2 + b * 2 + 1, high.to(element), mask=b < B)
    else:
        tl.store(out + n * B + b, (number(code, KIND, tl.float32) * scale).to(element), mask=b < B)


@triton.jit
def number(code, KIND: tl.constexpr, DTYPE: tl.constexpr):
    """What codes of 8 bits stand for: exact in 16 bits too."""
    if KIND == E4M3:
        # | s | e e e e | m m m |  to half precision: its exponent has one bit more, and a bias larger by 8.
        wide = code.to(tl.int16)
        half = ((wide & 0x7F) << 7 | (wide & -32768)).to(tl.float16, bitcast=True) * 256.0
        return tl.where((wide & 0x7F) == 0x7F, float("nan"), half).to(DTYPE)
    return code.to(DTYPE)


@triton.jit
def low_half(code, values, KIND: tl.constexpr, DTYPE: tl.constexpr):
    """What the first of two codes in a byte stands for."""
    if KIND == INT4:
        return ((code << 4) >> 4).to(DTYPE)
    return tl.load(values + (code & 15).to(tl.int32)).to(DTYPE)


@triton.jit
def high_half(code, values, KIND: tl.constexpr, DTYPE: tl.constexpr):
    """What the second of two codes in a byte stands for."""
    if KIND == INT4:
        return (code >> 4).to(DTYPE)
    return tl.load(values + ((code >> 4) & 15).to(tl.int32)).to(DTYPE)
