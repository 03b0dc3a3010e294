"""Scales with the least squared error instead of those that clip nothing: a few large weights may be clipped.

Letters: N output channels, K input features, G scales per channel.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fewbits.errors import FewbitsError
from fewbits.kernels.rotation import rotate
from fewbits.tensors.quantized import QuantizedTensor, encode_scaled, has_power_scales, nearest_values, step_for

_POWERS = (0.5, 1.0, 2.0)  # of scales that are powers of two: those beside the usual one
_CLIPPING = (*torch.linspace(0.6, 1.0, 21).tolist(), 1.05)
"""Fractions of the largest magnitude that a scale may be made for."""
_AT_A_TIME = 2**22  # elements: scratch memory stays small


def least_error(
    weight: Tensor,
    format_name: str,
    *,
    group_size: int | None = None,
    scale_dtype: torch.dtype = torch.float32,
    rotation: int = 0,
) -> QuantizedTensor:
    """Quantize a weight to nearest, with the scales that make its squared error the least.

    Args:
        weight: float ``[N, K]``.
        format_name: ``int8``, ``int4``, ``e4m3fn``, ``nf4`` or ``e2m1fn``.
        group_size: Input features that share a scale; it divides K. None: all of a channel.
        scale_dtype: float32, bfloat16 or float16.
        rotation: Block of input features to rotate first; 0: none.

    Raises:
        FewbitsError: If the weight holds NaN or Inf.
    """
    if not weight.isfinite().all():
        raise FewbitsError("weight: it holds NaN or Inf; repair the checkpoint or keep the layer")
    N, K = weight.shape
    step, group = max(1, _AT_A_TIME // K), group_size or K
    made = []
    for start in range(0, N, step):
        rows = weight[start : start + step].float()
        groups = (rotate(rows, rotation) if rotation else rows).view(len(rows), -1, group)
        scales = least_error_scales(groups, torch.ones(groups.shape[1:]), format_name, scale_dtype)
        made.append((encode_scaled((groups / scales.float()[..., None]).view(len(rows), K), format_name), scales))
    codes, all_scales = (torch.cat(parts) for parts in zip(*made, strict=True))
    return QuantizedTensor(codes, all_scales, format_name, rotation)


def least_error_scales(groups: Tensor, importance: Tensor, format_name: str, scale_dtype: torch.dtype) -> Tensor:
    """The scale of each group that makes its squared error the least: large weights may be clipped for the others.

    Args:
        groups: float32 ``[N, G, group]``.
        importance: What an error in each feature counts, ``[G, group]``, positive.
        format_name: The format of the codes.
        scale_dtype: What the scales are rounded to, up.

    Returns:
        ``[N, G]`` in ``scale_dtype``.
    """
    amax, best = groups.abs().amax(2), None
    least = torch.full_like(amax, torch.inf)
    for fraction in _POWERS if has_power_scales(format_name) else _CLIPPING:
        scales = step_for(amax * fraction, format_name, scale_dtype)
        steps = scales.float()[..., None]
        errors = ((nearest_values(groups / steps, format_name) * steps - groups).square() * importance).sum(2)
        better = errors < least
        least = torch.where(better, errors, least)
        best = scales if best is None else torch.where(better, scales, best)
    assert best is not None
    return best
