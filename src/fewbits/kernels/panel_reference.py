"""The ops on weights in panels in plain PyTorch: their meaning. Slow, on any device.

The compiled ``int4_linear`` is bit-equal to it on the CPU; ``weight_only_linear`` sums in another order.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fewbits.kernels import reference
from fewbits.kernels.panels import table, unpack_panels, unpack_scales

_E4M3FN_MAX = 448.0


def int4_linear(x: Tensor, packed: Tensor, scales: Tensor, bias: Tensor | None, out_features: int) -> Tensor:
    """See ``fewbits.kernels.panel_ops.int4_linear``."""
    codes, token_scales = reference.quantize_per_token(x)
    each = unpack_scales(scales, out_features).float()  # [N, G]
    N, G = each.shape
    weight = _values(packed, N, x.shape[-1], "int4").view(N, G, -1)
    tokens = codes.double().view(*x.shape[:-1], G, x.shape[-1] // G)
    out = x.new_zeros((*x.shape[:-1], N))
    for g in range(G):  # integers in float64: exact in any order
        out = out + (tokens[..., g, :] @ weight[:, g].double().T).float() * each[:, g]
    out = out * token_scales
    return out if bias is None else out + bias


def weight_only_linear(
    x: Tensor,
    packed: Tensor,
    scales: Tensor,
    bias: Tensor | None,
    out_features: int,
    format_name: str,
    e4m3_tokens: bool,
) -> Tensor:
    """See ``fewbits.kernels.panel_ops.weight_only_linear``."""
    weight = dequantize(packed, scales, out_features, x.shape[-1], format_name)
    if e4m3_tokens:
        x, token_scales = round_tokens(x)
        out = x @ weight.T * token_scales
    else:
        out = x @ weight.T
    return out if bias is None else out + bias


def round_tokens(x: Tensor) -> tuple[Tensor, Tensor]:
    """Each token ``[..., K]`` divided by its scale and rounded to e4m3fn, as float32; and the scales ``[..., 1]``."""
    amax = x.abs().amax(-1, keepdim=True)
    finite = amax.isfinite()
    scales = (amax / _E4M3FN_MAX).clamp_min(torch.finfo(torch.float32).tiny)
    rounded = torch.where(finite, x / scales, 0).to(torch.float8_e4m3fn).float()
    return rounded, torch.where(finite, scales, torch.nan)


def dequantize(packed: Tensor, scales: Tensor, N: int, K: int, format_name: str) -> Tensor:
    """The weight that panels and their scales stand for, float32 ``[N, K]``."""
    each = unpack_scales(scales, N).float()
    grouped = _values(packed, N, K, format_name).view(N, each.shape[1], -1)
    return (grouped * each[..., None]).view(N, K)


def _values(packed: Tensor, N: int, K: int, format_name: str) -> Tensor:
    values = table(format_name)
    if values is None:
        codes = unpack_panels(packed, N, K)
        return codes.view(torch.int8 if format_name == "int8" else torch.float8_e4m3fn).float()
    codes = unpack_panels(packed, N, K // 2)
    nibbles = torch.stack((codes & 15, codes >> 4), -1).flatten(1)
    return torch.tensor(values, device=packed.device)[nibbles.int()]
