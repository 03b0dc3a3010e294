"""Each op in plain PyTorch: its meaning. Slow, on any device; the compiled kernels are bit-equal to it on the CPU."""

from __future__ import annotations

import torch
from torch import Tensor

from fewbits.kernels.packing import unpack_int8


def quantize_per_token(x: Tensor) -> tuple[Tensor, Tensor]:
    """See ``fewbits.kernels.ops.quantize_per_token``."""
    amax = x.abs().amax(-1, keepdim=True)
    scales = (amax / 127).clamp_min(torch.finfo(torch.float32).tiny)
    codes = torch.round(x * (1 / scales))
    finite = amax.isfinite()
    return torch.where(finite, codes, 0).to(torch.int8), torch.where(finite, scales, torch.nan)


def int8_matmul(
    codes: Tensor, token_scales: Tensor, packed: Tensor, channel_scales: Tensor, bias: Tensor | None
) -> Tensor:
    """See ``fewbits.kernels.ops.int8_matmul``."""
    weight = unpack_int8(packed, channel_scales.shape[0], codes.shape[-1])
    # Products of bytes summed in float64 are exact: integers far below 2^53, in any order.
    sums = codes.double() @ weight.double().T
    out = sums.float() * token_scales * channel_scales
    return out if bias is None else out + bias


def int8_linear(x: Tensor, packed: Tensor, channel_scales: Tensor, bias: Tensor | None) -> Tensor:
    """See ``fewbits.kernels.ops.int8_linear``."""
    return int8_matmul(*quantize_per_token(x), packed, channel_scales, bias)


def int8_linear_two_digits(x: Tensor, packed: Tensor, channel_scales: Tensor, bias: Tensor | None) -> Tensor:
    """See ``fewbits.kernels.ops.int8_linear_two_digits``."""
    high, high_scales = quantize_per_token(x)
    low, low_scales = quantize_per_token(x - high * high_scales)
    out = int8_matmul(high, high_scales, packed, channel_scales, None)
    out = out + int8_matmul(low, low_scales, packed, channel_scales, None)
    return out if bias is None else out + bias
