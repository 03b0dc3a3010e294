"""Which kernel multiplies by a stored weight: Triton's for few rows, cuBLAS for many.

| activations | up to 64 rows | more |
|---|---|---|
| int8 | quantize, matmul | the same with ``torch._int_mm`` and ``rescale``, if the weight is int8 in whole channels |
| e4m3fn | quantize, matmul | the same with ``torch._scaled_mm``, on a GPU that multiplies FP8 |
| as they are | matmul | dequantize for the moment, ``torch.nn.functional.linear`` |

Nothing waits for the GPU or depends on values, so a CUDA graph can hold it. Letters: M tokens, K input features, N
output channels, G scales per channel.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import linear

from fewbits.kernels import stored_reference
from fewbits.kernels.cuda.decode import dequantize
from fewbits.kernels.cuda.device import FP8, FP8_ROW_WISE, TRITON, can, on
from fewbits.kernels.cuda.matmul import matmul, takes_groups
from fewbits.kernels.cuda.rescale import rescale
from fewbits.kernels.cuda.tokens import quantize_tokens
from fewbits.kernels.panels import table

FEW_ROWS = 64
"""Up to so many rows a matmul waits for the weight rather than for the arithmetic."""

_INT_MM_STEP, _SCALED_MM_STEP = 8, 16  # K and N are multiples of it


def stored_linear(
    x: Tensor, codes: Tensor, scales: Tensor, bias: Tensor | None, format_name: str, activations: str | None
) -> Tensor:
    """See ``fewbits.kernels.stored_ops.stored_linear``."""
    if not _has_kernel(x, scales, format_name, activations):
        return stored_reference.stored_linear(x, codes, scales, bias, format_name, activations)
    rows, M, N = x.reshape(-1, x.shape[-1]), x.shape[:-1].numel(), codes.shape[0]
    with on(x.device):
        if M == 0 or N == 0:
            out = x.new_empty((M, N))
        elif activations is not None:
            out = _by_codes(rows, codes.contiguous(), scales.contiguous(), bias, format_name, activations)
        elif M <= FEW_ROWS:
            out = matmul(
                rows.contiguous(), codes.contiguous(), scales.contiguous(), bias, format_name, None, None, x.dtype
            )
        else:
            weight = dequantize(codes.contiguous(), scales.contiguous(), format_name, x.dtype)
            out = linear(rows, weight, None if bias is None else bias.to(x.dtype))
    return out.view(*x.shape[:-1], N)


def stored_linear_two_digits(x: Tensor, codes: Tensor, scales: Tensor, bias: Tensor | None) -> Tensor:
    """See ``fewbits.kernels.stored_ops.stored_linear_two_digits``."""
    if not _has_kernel(x, scales, "int8", "int8"):
        return stored_reference.stored_linear_two_digits(x, codes, scales, bias)
    rows, M, N = x.reshape(-1, x.shape[-1]), x.shape[:-1].numel(), codes.shape[0]
    with on(x.device):
        if M == 0 or N == 0:
            out = x.new_empty((M, N))
        else:
            out = _by_codes(rows, codes.contiguous(), scales.contiguous(), bias, "int8", "int8", digits=2)
    return out.view(*x.shape[:-1], N)


def _by_codes(
    x: Tensor, codes: Tensor, scales: Tensor, bias: Tensor | None, format_name: str, activations: str, digits: int = 1
) -> Tensor:
    """Quantize the tokens ``[M, K]``, then multiply codes by codes."""
    M, K = x.shape
    N, G = scales.shape
    tokens, token_scales = quantize_tokens(x, activations, halves=table(format_name) is not None, digits=digits)
    many = M * digits > FEW_ROWS and G == 1
    if many and format_name == "int8" and K % _INT_MM_STEP == N % _INT_MM_STEP == 0:
        return rescale(torch._int_mm(tokens.view(-1, K), codes.T), token_scales, scales, bias, x.dtype)
    if many and format_name == "e4m3fn" and K % _SCALED_MM_STEP == N % _SCALED_MM_STEP == 0 and can(x.device, FP8):
        return _fp8_matmul(tokens.view(M, K), codes, token_scales, scales, bias, x.dtype)
    return matmul(tokens, codes, scales, bias, format_name, token_scales, activations, x.dtype)


def _fp8_matmul(
    tokens: Tensor, codes: Tensor, token_scales: Tensor, scales: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """By ``torch._scaled_mm``, summed in float32: with the scales in it where it takes them, else with ``rescale``."""
    a, b = tokens.view(torch.float8_e4m3fn), codes.view(torch.float8_e4m3fn).T
    if dtype == torch.bfloat16 and can(tokens.device, FP8_ROW_WISE):  # the one result that every version of CUDA gives
        return torch._scaled_mm(
            a, b, token_scales.view(-1, 1), scales.float().view(1, -1), None if bias is None else bias.to(dtype),
            out_dtype=dtype, use_fast_accum=False,
        )  # fmt: skip
    one = torch.ones((), dtype=torch.float32, device=tokens.device)
    sums = torch._scaled_mm(a, b, one, one, out_dtype=torch.float32, use_fast_accum=False)
    return rescale(sums, token_scales, scales, bias, dtype)


def _has_kernel(x: Tensor, scales: Tensor, format_name: str, activations: str | None) -> bool:
    """Whether the kernels take these formats, groups and GPU; else the op's meaning computes."""
    pair = activations is None or format_name in {"int8": ("int8", "int4"), "e4m3fn": ("e4m3fn",)}.get(activations, ())
    whole = scales.is_floating_point() and takes_groups(x.shape[-1], scales.shape[1])
    return pair and whole and can(x.device, TRITON)
