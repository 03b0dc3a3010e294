"""Values in place of codes, where a layout cannot say the codes: quantized again, they give the same codes."""

from __future__ import annotations

import torch
from torch import Tensor

from fewbits.tensors.quantized import LARGEST_CODE, QuantizedTensor


def requantizable(weight: QuantizedTensor, dtype: torch.dtype) -> Tensor:
    """The values of int8 codes in ``dtype``, such that ``quantize_weight`` makes these codes and scales of them.

    A scale is a channel's largest magnitude / 127, rounded up, so that this magnitude must not grow when it is rounded
    to ``dtype``: it takes the largest number that still has its code and its scale. Every other value is the nearest
    one to code · scale, which is less than half a step away.

    Args:
        weight: int8 codes ``[N, K]`` and scales ``[N, 1]`` as ``quantize_weight`` made them, of a weight and with
            scales in ``dtype``. Of others the values are right, but may be quantized in another way.
        dtype: float32, bfloat16 or float16.
    """
    scales, digits = weight.scales.float(), weight.codes.float()
    top = digits.abs().amax(1, keepdim=True)
    largest = (top + 0.5).clamp_max(LARGEST_CODE) * scales
    rounded = largest.to(dtype)
    if dtype != torch.float32:  # of a 16-bit float, the next smaller one is the next smaller code
        rounded = torch.where(rounded.float() > largest, (rounded.view(torch.int16) - 1).view(dtype), rounded)
    at_top = (digits.abs() == top) & (scales > torch.finfo(dtype).tiny)  # tiny is the scale of all that is smaller
    return torch.where(at_top, rounded * digits.sign().to(dtype), (digits * scales).to(dtype))
