"""A weight in few bits: int8 codes with one scale per output channel.

Letters: N output channels, K input features.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fewbits.errors import FewbitsError

LARGEST_CODE = 127
"""Codes are symmetric: −128 is left out, so that a weight and its negative have the same magnitude of code."""


@dataclass(frozen=True)
class QuantizedTensor:
    """``weight ≈ codes · scales``.

    Attributes:
        codes: int8 ``[N, K]``, −127…127.
        scales: float ``[N, 1]``, positive.
    """

    codes: Tensor
    scales: Tensor

    @property
    def nbytes(self) -> int:
        """Bytes of codes and scales."""
        return self.codes.nbytes + self.scales.nbytes

    def dequantize(self) -> Tensor:
        """Return the weight that the codes stand for, float32 ``[N, K]``."""
        return self.codes.float() * self.scales.float()


def quantize_per_channel(weight: Tensor, *, scale_dtype: torch.dtype = torch.float32) -> QuantizedTensor:
    """Quantize a weight to int8, one scale per output channel (dimension 0), round to nearest even.

    ``scale = max|w| / 127`` rounded *up* to ``scale_dtype``, and the codes are made with that rounded scale: no weight
    is clipped, and what a reader dequantizes with is what the codes were made for. A channel of zeros gets the
    smallest normal scale and codes 0.

    Args:
        weight: float ``[N, K]``.
        scale_dtype: float32, bfloat16 or float16.

    Raises:
        FewbitsError: If the weight holds NaN or Inf, a scale is beyond ``scale_dtype``, or it is not a matrix.
    """
    if weight.ndim != 2 or weight.shape[1] == 0 or not weight.is_floating_point():
        raise FewbitsError(
            f"weight: float [N, K] with K > 0 is needed, got {weight.dtype} {list(weight.shape)}; reshape or "
            "dequantize it"
        )
    weight = weight.float()
    amax = weight.abs().amax(1, keepdim=True)
    if not amax.isfinite().all():
        channel = int((~amax.isfinite()).nonzero()[0, 0])
        raise FewbitsError(f"weight: NaN or Inf in output channel {channel}; repair the checkpoint or keep the layer")
    scales = _round_up(amax / LARGEST_CODE, scale_dtype)
    if not scales.isfinite().all():
        channel = int((~scales.isfinite()).nonzero()[0, 0])
        raise FewbitsError(
            f"weight: output channel {channel} needs the scale {amax[channel, 0] / LARGEST_CODE:.6g}, and the largest "
            f"{scale_dtype} is {torch.finfo(scale_dtype).max:.6g}; keep the layer or cast the model to bf16 first"
        )
    codes = torch.round(weight / scales.float()).clamp_(-LARGEST_CODE, LARGEST_CODE).to(torch.int8)
    return QuantizedTensor(codes, scales)


def _round_up(positive: Tensor, dtype: torch.dtype) -> Tensor:
    """Round positive float32 values up to ``dtype``, at least to its smallest normal number."""
    positive = positive.clamp_min(torch.finfo(dtype).tiny)
    rounded = positive.to(dtype)
    if dtype == torch.float32:
        return rounded
    # The next larger 16-bit float is the next larger code.
    return torch.where(rounded.float() < positive, (rounded.view(torch.int16) + 1).view(dtype), rounded)
