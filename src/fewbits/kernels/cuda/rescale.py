"""What follows a matmul of codes by cuBLAS: both scales, the bias, and the dtype of the result, in one pass.

Letters: M tokens, N output channels.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 1024


def rescale(
    sums: Tensor, token_scales: Tensor, channel_scales: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """``sums · token_scale · channel_scale``, added up over digits, plus bias; each step rounds once to float32.

    Args:
        sums: int32 or float32 ``[digits · M, N]``, contiguous; one or two digits.
        token_scales: float32 ``[digits, M]``.
        channel_scales: ``[N, 1]``, any float dtype.
        bias: float32 ``[N]`` or None.
        dtype: Of the result.
    """
    digits, M = token_scales.shape
    N = sums.shape[1]
    out = torch.empty((M, N), dtype=dtype, device=sums.device)
    _rescale[(M, triton.cdiv(N, _BLOCK))](
        sums, token_scales, channel_scales, channel_scales if bias is None else bias, out, M, N,
        BIAS=bias is not None, DIGITS=digits, BLOCK=_BLOCK, enable_fp_fusion=False,
    )  # fmt: skip
    return out


@triton.jit
def _rescale(
    sums, token_scales, channel_scales, bias, out, M, N,
    BIAS: tl.constexpr, DIGITS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    m = tl.program_id(0).to(tl.int64)
    n = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    channel = tl.load(channel_scales + n, mask=n < N, other=0.0).to(tl.float32)
    total = tl.load(sums + m * N + n, mask=n < N, other=0).to(tl.float32) * tl.load(token_scales + m) * channel
    if DIGITS == 2:
        low = tl.load(sums + (M + m) * N + n, mask=n < N, other=0).to(tl.float32)
        total += low * tl.load(token_scales + M + m) * channel
    if BIAS:
        total += tl.load(bias + n, mask=n < N, other=0.0)
    tl.store(out + m * N + n, total.to(out.dtype.element_ty), mask=n < N)
