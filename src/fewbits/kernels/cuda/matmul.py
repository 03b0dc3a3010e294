"""One matmul for every stored weight: codes become numbers in registers, scales and bias are its epilogue.

Made for the few rows of a decode step, where it waits for the weight's bytes alone; it takes any number of rows.

Letters: M tokens, N output channels, K input features, B bytes and G scales of a channel.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fewbits.kernels.cuda.decode import INT4, codebook, high_half, kind_of, low_half, number

_AS_THEY_ARE, _INT8, _E4M3 = (tl.constexpr(kind) for kind in range(3))
_TOKENS = {None: _AS_THEY_ARE, "int8": _INT8, "e4m3fn": _E4M3}
_FLOATS = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
_LEAST_STEP = 32  # features: tensor cores take 32 bytes of each row at a time


class _Tiles(NamedTuple):
    """What a program computes: rows of x, channels, features at a step; and how the steps overlap."""

    rows: int
    channels: int
    features: int
    warps: int
    stages: int


def takes_groups(K: int, G: int) -> bool:
    """Whether groups are whole steps of the kernel; a single group of any length is."""
    return G == 1 or (K // G) % _LEAST_STEP == 0


def matmul(
    x: Tensor,
    codes: Tensor,
    scales: Tensor,
    bias: Tensor | None,
    format_name: str,
    token_scales: Tensor | None,
    activations: str | None,
    dtype: torch.dtype,
) -> Tensor:
    """``(Σ_g (Σ_{k in g} x · value(w)) · scale_g) · token_scale + bias``, ``[M, N]``.

    Sums of integers are exact; other sums are in float32. int8 with a scale per channel, and int4 in groups of at most
    128, give the bits of ``int8_linear``, ``int8_linear_two_digits`` and ``int4_linear``.

    Args:
        x: What ``quantize_tokens`` gives, ``[digits, M, K]`` (in halves for codes of 4 bits); or float ``[M, K]``.
        codes: int8 ``[N, B]``, contiguous.
        scales: float ``[N, G]``, contiguous; K / G is a multiple of 32, or G is 1.
        bias: float32 ``[N]`` or None.
        format_name: Of the codes.
        token_scales: float32 ``[digits, M]``, or None for float x.
        activations: The format of x, or None.
        dtype: Of the result.
    """
    digits = 1 if token_scales is None else x.shape[0]
    M, K = x.shape[-2:]
    N, G = codes.shape[0], scales.shape[1]
    chosen = plan(M, K, G, format_name, activations, x.dtype, digits)
    out = torch.empty((M, N), dtype=dtype, device=x.device)
    grid = triton.cdiv(M, chosen.constants["BM"]), triton.cdiv(N, chosen.constants["BN"])
    _matmul[grid](
        x, codes, scales, scales if token_scales is None else token_scales, codebook(format_name, x.device),
        scales if bias is None else bias, out, M, N, K, G, K // G, x.stride(-2),
        BIAS=bias is not None, DIGITS=digits, **chosen.constants, **chosen.options,
    )  # fmt: skip
    return out


class Plan(NamedTuple):
    """A choice of the kernel's constants, and how it is compiled."""

    constants: dict[str, Any]
    options: dict[str, Any]


def plan(
    M: int, K: int, G: int, format_name: str, activations: str | None, dtype: torch.dtype, digits: int = 1
) -> Plan:
    """How to multiply M tokens of that dtype, or quantized to ``activations``, by a weight in G groups.

    Integers of 4 bits in steps too short for the tensor cores' integers are multiplied in half precision, as FP8
    always is: the numbers fit it, and their sums fit float32.
    """
    kind = kind_of(format_name)
    tiles = _tiles(M, K, G, digits if activations else dtype.itemsize)
    numbers = tl.int8
    if activations is None:
        numbers = _FLOATS[dtype]
    elif activations == "e4m3fn" or (kind >= INT4.value and tiles.features // 2 < _LEAST_STEP):
        numbers = tl.float16
    constants = {
        "KIND": kind, "TOKENS": _TOKENS[activations].value, "NUMBER": numbers,
        "EXACT": tl.int32 if numbers == tl.int8 else tl.float32, "GROUPED": G > 1,
        "BM": tiles.rows, "BN": tiles.channels, "BK": tiles.features,
    }  # fmt: skip
    fused = activations is None  # else it rounds as the CPU's kernels do
    return Plan(constants, {"num_warps": tiles.warps, "num_stages": tiles.stages, "enable_fp_fusion": fused})


def _tiles(M: int, K: int, G: int, x_bytes: int) -> _Tiles:
    """A step lies within one group. Few rows: small tiles, so that every multiprocessor has weights to read.

    Args:
        M: Tokens.
        K: Input features.
        G: Groups.
        x_bytes: Of a feature of a token, all digits together: what is on the way fits the smallest shared memory.
    """
    if M <= 16:
        tiles = _Tiles(16, 16 if G == 1 else 32, 256 if x_bytes <= 2 else 64, 4, 4)
    elif M <= 64:
        tiles = _Tiles(32 if M <= 32 else 64, 64, 128 // x_bytes, 4, 4)
    else:
        tiles = _Tiles(128, 128, 128 // x_bytes, 8, 3)
    within = triton.next_power_of_2(K) if G == 1 else (K // G) & -(K // G)  # the power of two in a group
    features = max(_LEAST_STEP, min(tiles.features, within))
    stages = 8 if M <= 16 and features <= 64 else tiles.stages  # short steps: more of them on the way
    return tiles._replace(features=features, stages=stages)


@triton.jit
def _matmul(
    x, codes, scales, token_scales, values, bias, out, M, N, K, G, group, stride,
    KIND: tl.constexpr, TOKENS: tl.constexpr, NUMBER: tl.constexpr, EXACT: tl.constexpr, GROUPED: tl.constexpr,
    BIAS: tl.constexpr, DIGITS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    PER_BYTE: tl.constexpr = 2 if KIND >= INT4 else 1
    STEP: tl.constexpr = BK // PER_BYTE
    SUM: tl.constexpr = tl.float32 if GROUPED else EXACT
    m = tl.program_id(0) * BM + tl.arange(0, BM)
    n = tl.program_id(1) * BN + tl.arange(0, BN)
    B = K // PER_BYTE
    tokens = x + m.to(tl.int64)[:, None] * stride
    channels = codes + n.to(tl.int64)[:, None] * B
    total = tl.zeros((BM, BN), SUM)
    low = tl.zeros((BM, BN), SUM)  # of the second digit
    for start in range(0, B, STEP):
        b = start + tl.arange(0, STEP)
        code = tl.load(channels + b[None, :], mask=(n < N)[:, None] & (b < B)[None, :], other=0)
        if PER_BYTE == 2:
            first = low_half(code, values, KIND, NUMBER)
            second = high_half(code, values, KIND, NUMBER)
        else:
            first = number(code, KIND, NUMBER)
            second = first
        mask = (m < M)[:, None] & (b < B)[None, :]
        if GROUPED:
            scale = tl.load(scales + n.to(tl.int64) * G + start * PER_BYTE // group, mask=n < N, other=0.0)
            exact = tl.zeros((BM, BN), EXACT)
            exact = _add_products(exact, tokens, b, mask, K, first, second, TOKENS, NUMBER, PER_BYTE)
            total += exact.to(tl.float32) * scale.to(tl.float32)[None, :]
        else:
            total = _add_products(total, tokens, b, mask, K, first, second, TOKENS, NUMBER, PER_BYTE)
        if DIGITS == 2:
            lower = x + (M + m).to(tl.int64)[:, None] * stride
            low = _add_products(low, lower, b, mask, K, first, second, TOKENS, NUMBER, PER_BYTE)

    result = total.to(tl.float32)
    if TOKENS != _AS_THEY_ARE:
        result *= tl.load(token_scales + m, mask=m < M, other=0.0)[:, None]
    if not GROUPED:
        channel = tl.load(scales + n, mask=n < N, other=0.0).to(tl.float32)
        result *= channel[None, :]
        if DIGITS == 2:
            low_scales = tl.load(token_scales + M + m, mask=m < M, other=0.0)
            result += low.to(tl.float32) * low_scales[:, None] * channel[None, :]
    if BIAS:
        result += tl.load(bias + n, mask=n < N, other=0.0)[None, :]
    place = out + m.to(tl.int64)[:, None] * N + n[None, :]
    tl.store(place, result.to(out.dtype.element_ty), mask=(m < M)[:, None] & (n < N)[None, :])


@triton.jit
def _add_products(
    total, tokens, b, mask, K, first, second,
    TOKENS: tl.constexpr, NUMBER: tl.constexpr, PER_BYTE: tl.constexpr,
):  # fmt: skip
    """Add x · w over the features in these bytes: those in the low halves, then those in the high ones."""
    if PER_BYTE == 1:
        return _dot(_numbers(tokens + b[None, :], mask, TOKENS, NUMBER), first, total)
    if TOKENS == _AS_THEY_ARE:
        even, odd = tokens + b[None, :] * 2, tokens + b[None, :] * 2 + 1
    else:  # in halves
        even, odd = tokens + b[None, :], tokens + b[None, :] + K // 2
    total = _dot(_numbers(even, mask, TOKENS, NUMBER), first, total)
    return _dot(_numbers(odd, mask, TOKENS, NUMBER), second, total)


@triton.jit
def _numbers(places, mask, TOKENS: tl.constexpr, NUMBER: tl.constexpr):
    loaded = tl.load(places, mask=mask, other=0)
    if TOKENS == _E4M3:
        return number(loaded, 1, NUMBER)
    return loaded.to(NUMBER)


@triton.jit
def _dot(rows, channels, total):
    return tl.dot(rows, tl.trans(channels), total, input_precision="ieee", out_dtype=total.dtype)
