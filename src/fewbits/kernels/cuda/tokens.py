"""Activations to 8 bits with a scale per token, in one launch; bit-equal to the ops' plain PyTorch.

Letters: M tokens, K input features.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_DIVISOR = {"int8": 127.0, "e4m3fn": 448.0}  # the largest code of each
_LARGEST_BLOCK = 4096  # features that a program holds at a time


def quantize_tokens(x: Tensor, format_name: str, *, halves: bool = False, digits: int = 1) -> tuple[Tensor, Tensor]:
    """Quantize each token with the scale ``max(max|x| / divisor, 2⁻¹²⁶)``.

    A token with NaN or Inf gets codes 0 and the scale NaN.

    Args:
        x: float32, bfloat16 or float16 ``[M, K]``, M and K above 0; computed in float32.
        format_name: ``int8`` or ``e4m3fn``.
        halves: Put features 0, 2, 4, … first and 1, 3, 5, … after them, as two codes in a byte want them. K is even.
        digits: 2: what the codes leave of x is quantized once more.

    Returns:
        Codes, int8 (8 bits of the format) ``[digits, M, K]``, and scales, float32 ``[digits, M]``.
    """
    M, K = x.shape
    x = x if x.stride(1) == 1 else x.contiguous()
    codes = torch.empty((digits, M, K), dtype=torch.int8, device=x.device)
    scales = torch.empty((digits, M), dtype=torch.float32, device=x.device)
    block = min(_LARGEST_BLOCK, triton.next_power_of_2(K))
    _quantize_tokens[(M,)](
        x, codes, scales, M, K, x.stride(0),
        DIVISOR=_DIVISOR[format_name], E4M3=format_name == "e4m3fn", HALVES=halves, DIGITS=digits, BLOCK=block,
        num_warps=8 if block > 1024 else 4,
        enable_fp_fusion=False,  # a multiplication and an addition in one rounding would give other codes
    )  # fmt: skip
    return codes, scales


@triton.jit
def _quantize_tokens(
    x, codes, scales, M, K, stride,
    DIVISOR: tl.constexpr, E4M3: tl.constexpr, HALVES: tl.constexpr, DIGITS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    m = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    largest = tl.zeros((BLOCK,), tl.float32)
    spoiled = tl.zeros((BLOCK,), tl.int32)
    for start in range(0, K, BLOCK):
        k = start + columns
        size = tl.abs(tl.load(x + m * stride + k, mask=k < K, other=0.0).to(tl.float32))
        finite = size < float("inf")  # no NaN is
        largest = tl.maximum(largest, tl.where(finite, size, 0.0))
        spoiled = tl.where(finite, spoiled, 1)
    bad = tl.max(spoiled, 0) > 0
    scale = _scale(tl.max(largest, 0), DIVISOR)
    tl.store(scales + m, tl.where(bad, float("nan"), scale))

    left = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, K, BLOCK):
        k = start + columns
        value = tl.load(x + m * stride + k, mask=k < K, other=0.0).to(tl.float32)
        value = tl.where(bad, 0.0, value)
        place = (k % 2) * (K // 2) + k // 2 if HALVES else k
        if E4M3:
            code = _e4m3(tl.div_rn(value, tl.zeros_like(value) + scale))
        else:
            digit = _round(value * tl.div_rn(1.0, scale))
            left = tl.maximum(left, tl.abs(value - digit * scale))
            code = digit.to(tl.int32)
        tl.store(codes + m * K + place, code.to(tl.int8), mask=k < K)

    if DIGITS == 2:
        low_scale = _scale(tl.max(left, 0), DIVISOR)
        tl.store(scales + M + m, tl.where(bad, float("nan"), low_scale))
        for start in range(0, K, BLOCK):
            k = start + columns
            value = tl.load(x + m * stride + k, mask=k < K, other=0.0).to(tl.float32)
            value = tl.where(bad, 0.0, value)
            value = value - _round(value * tl.div_rn(1.0, scale)) * scale
            code = _round(value * tl.div_rn(1.0, low_scale)).to(tl.int32)
            tl.store(codes + (M + m) * K + k, code.to(tl.int8), mask=k < K)


@triton.jit
def _scale(amax, DIVISOR: tl.constexpr):
    return tl.maximum(tl.div_rn(amax, DIVISOR), 2.0**-126)


@triton.jit
def _round(value):
    """To the nearest integer, halves to even, below 2²²: the last bit of 1.5 · 2²³ + value stands for 1."""
    return (value + 12582912.0) - 12582912.0


@triton.jit
def _e4m3(value):
    """The code of the nearest e4m3fn number, halves to even, for |value| < 464. Needs no GPU with FP8.

    1. 1.5 · 2²⁰ times the power of two below |value|, at least 2⁻⁶, has that number's last bit as its own: adding
       and subtracting it rounds.
    2. Normal numbers have the exponent bias 7 instead of 127; subnormal ones count steps of 2⁻⁹.
    """
    bits = value.to(tl.int32, bitcast=True)
    exponent = tl.maximum(bits & 0x7F800000, (127 - 6) << 23)
    magic = (exponent + (20 << 23)).to(tl.float32, bitcast=True) * 1.5
    rounded = (value + magic) - magic
    size = tl.abs(rounded)
    normal = (size.to(tl.int32, bitcast=True) >> 20) - ((127 - 7) << 3)
    code = tl.where(size < 0.015625, (size * 512.0).to(tl.int32), normal)
    return code | ((bits >> 24) & 0x80)
