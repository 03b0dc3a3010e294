"""How a quantized weight lies in memory for the kernels of its device, and the multiplication by it.

Letters: M tokens, K input features, N output channels, G scales per channel. On the CPU a weight that a kernel reads
has codes of three dimensions: int8 with int8 activations in the panels of ``kernels.packing`` and scales ``[N]``, the
others in those of ``kernels.panels`` and scales of three dimensions. Elsewhere codes and scales lie as they are stored.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fewbits.kernels import ops, panel_ops, stored_ops
from fewbits.kernels.packing import pack_int8, unpack_int8
from fewbits.kernels.panels import fits_panels, pack_panels, pack_scales, unpack_panels, unpack_scales
from fewbits.tensors.quantized import CODE_DTYPES, QuantizedTensor, is_packed

_E4M3FN_NAN = 0x7F


def pack_weight(weight: QuantizedTensor, activations: str | None) -> tuple[Tensor, Tensor]:
    """Codes, int8, and scales of one weight in the layout that the CPU's kernels read, if there is one.

    Args:
        weight: Codes and scales as they are stored, on the CPU.
        activations: The format that activations are quantized to, a scale per token; None: they are not.
    """
    codes = weight.codes.view(torch.int8)
    if weight.format == activations == "int8" and weight.scales.shape[1] == 1:
        return pack_int8(codes), weight.scales.flatten().float()
    if fits_panels(codes, weight.scales, weight.format) and _has_kernel(weight, activations):
        return pack_panels(codes), pack_scales(weight.scales)
    return codes, weight.scales


def unpack_weight(
    codes: Tensor, scales: Tensor, shape: tuple[int, int], format_name: str, scale_dtype: torch.dtype
) -> QuantizedTensor:
    """The inverse of ``pack_weight``, for a weight of that shape ``(N, K)``; what is not packed stays as it is."""
    N, K = shape
    if codes.ndim == 3 and scales.ndim == 1:
        codes, scales = unpack_int8(codes, N, K), scales[:, None].to(scale_dtype)
    elif codes.ndim == 3:
        codes = unpack_panels(codes, N, K // 2 if is_packed(format_name) else K)
        scales = unpack_scales(scales, N).to(scale_dtype)
    return QuantizedTensor(codes.view(CODE_DTYPES[format_name]), scales, format_name)


def quantized_linear(
    x: Tensor,
    codes: Tensor,
    scales: Tensor,
    bias: Tensor | None,
    out_features: int,
    format_name: str,
    activations: str | None,
) -> Tensor:
    """Multiply activations ``[..., K]`` by a quantized weight; the result has the dtype of x.

    Args:
        x: Activations, float32, bfloat16 or float16.
        codes: What ``pack_weight`` gives; or ``[N, K]`` (``[N, K/2]`` for 4 bits), in 8 bits of any dtype.
        scales: What ``pack_weight`` gives; or ``[N, G]``.
        bias: float32 ``[N]`` or None.
        out_features: N.
        format_name: The format of the codes.
        activations: The format that x is quantized to, a scale per token; None: it is not.
    """
    if codes.ndim == 2 and codes.device.type == "cpu":  # brought from elsewhere for a moment, or there is no kernel
        stored = QuantizedTensor(codes.view(CODE_DTYPES[format_name]), scales, format_name)
        codes, scales = pack_weight(stored, activations)
    if codes.ndim == 2:
        return stored_ops.stored_linear(
            x, codes.view(torch.int8), scales, bias, format_name=format_name, activations=activations
        )
    if scales.ndim == 1:
        out = ops.int8_linear(x.float(), codes, scales, bias)
    elif format_name == "int4" and activations == "int8":
        out = panel_ops.int4_linear(x.float(), codes, scales, bias, out_features=out_features)
    else:
        out = panel_ops.weight_only_linear(
            x.float(), codes, scales, bias,
            out_features=out_features, format_name=format_name, e4m3_tokens=activations == "e4m3fn",
        )  # fmt: skip
    return out.to(x.dtype)


def _has_kernel(weight: QuantizedTensor, activations: str | None) -> bool:
    if weight.format == "int4":
        return activations in (None, "int8")
    if weight.format == "e4m3fn":  # the kernel knows no NaN
        return activations in (None, "e4m3fn") and not bool(
            (weight.codes.view(torch.uint8) & _E4M3FN_NAN).eq(_E4M3FN_NAN).any()
        )
    return activations is None
