"""The ops on weights as they are stored in plain PyTorch: their meaning, on any device."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import linear

from fewbits.kernels import ops
from fewbits.kernels.panel_reference import round_tokens
from fewbits.kernels.panels import table


def stored_linear(
    x: Tensor, codes: Tensor, scales: Tensor, bias: Tensor | None, format_name: str, activations: str | None
) -> Tensor:
    """See ``fewbits.kernels.stored_ops.stored_linear``."""
    if activations is None:
        weight = dequantize(codes, scales, format_name).to(x.dtype)
        return linear(x, weight, None if bias is None else bias.to(x.dtype))
    if activations == "int8":
        digits, token_scales = ops.quantize_per_token(x.float())
    else:
        digits, token_scales = round_tokens(x.float())
    if scales.shape[1] == 1:
        out = linear(digits.float(), _values(codes, format_name)) * token_scales * scales.flatten().float()
    else:
        out = linear(digits.float(), dequantize(codes, scales, format_name)) * token_scales
    return (out if bias is None else out + bias).to(x.dtype)


def stored_linear_two_digits(x: Tensor, codes: Tensor, scales: Tensor, bias: Tensor | None) -> Tensor:
    """See ``fewbits.kernels.stored_ops.stored_linear_two_digits``."""
    high, high_scales = ops.quantize_per_token(x.float())
    low, low_scales = ops.quantize_per_token(x.float() - high * high_scales)
    weight, channel_scales = codes.float(), scales.flatten().float()
    out = linear(high.float(), weight) * high_scales * channel_scales
    out = out + linear(low.float(), weight) * low_scales * channel_scales
    return (out if bias is None else out + bias).to(x.dtype)


def dequantize(codes: Tensor, scales: Tensor, format_name: str) -> Tensor:
    """The weight that codes, int8 ``[N, B]``, and scales ``[N, G]`` stand for, float32 ``[N, K]``."""
    values = _values(codes, format_name)
    N, G = scales.shape
    return (values.view(N, G, -1) * scales.float()[..., None]).view(N, -1)


def _values(codes: Tensor, format_name: str) -> Tensor:
    values = table(format_name)
    if values is None:
        return codes.view(torch.int8 if format_name == "int8" else torch.float8_e4m3fn).float()
    both = codes.view(torch.uint8)
    nibbles = torch.stack((both & 15, both >> 4), -1).flatten(1)
    return torch.tensor(values, device=codes.device)[nibbles.int()]
