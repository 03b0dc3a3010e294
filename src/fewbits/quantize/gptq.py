"""GPTQ: round a weight column by column, and let the columns that are left make up for each error.

What counts is not the weight but what a layer gives: with the second moments H = Σ x xᵀ of its inputs, the error of a
rounded weight is Σ (W − Ŵ) H (W − Ŵ)ᵀ. Source: Frantar et al., "GPTQ" (arXiv 2210.17323), section 3 and algorithm 1;
columns in the order of their moments, the largest first, with the scales of groups as they lie in the weight.

Letters: N output channels, K input features, G scales per channel.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fewbits.errors import FewbitsError
from fewbits.kernels.rotation import rotate
from fewbits.models.precision import Precision
from fewbits.quantize.least_error import least_error_scales
from fewbits.tensors.quantized import QuantizedTensor, encode_scaled, nearest_values

_BLOCK = 64  # columns whose errors are spread at once
_DAMPING = 0.01  # of the mean moment, added to each: H of few tokens is nearly singular


def gptq(
    weight: Tensor,
    moments: Tensor,
    format_name: str,
    *,
    group_size: int | None = None,
    scale_dtype: torch.dtype = torch.float32,
    rotation: int = 0,
) -> QuantizedTensor:
    """Quantize a weight so that the layer's outputs, rather than its weights, stay what they are.

    A feature that was 0 in all tokens is rounded to nearest.

    Args:
        weight: float ``[N, K]``.
        moments: Σ x xᵀ over the tokens that the layer was given, float32 ``[K, K]``.
        format_name: ``int8``, ``int4``, ``e4m3fn``, ``nf4`` or ``e2m1fn``.
        group_size: Input features that share a scale; it divides K. None: all of a channel.
        scale_dtype: float32, bfloat16 or float16.
        rotation: Block of input features to rotate first; 0: none.

    Raises:
        FewbitsError: If the weight or the moments hold NaN or Inf.
    """
    W, H = weight.float(), moments.float()
    if not H.isfinite().all():
        raise FewbitsError("the calibration gave activations that are NaN or Inf; calibrate on other text")
    if not W.isfinite().all():
        raise FewbitsError("weight: it holds NaN or Inf; repair the checkpoint or keep the layer")
    if rotation:
        W, H = rotate(W, rotation), rotate(rotate(H, rotation).T, rotation)
    N, K = W.shape
    groups = W.view(N, -1, group_size or K)
    importance = H.diagonal() + _DAMPING * H.diagonal().mean() + torch.finfo(torch.float32).tiny
    scales = least_error_scales(groups, importance.view(groups.shape[1], -1), format_name, scale_dtype)
    steps = scales.float().repeat_interleave(groups.shape[2], 1)
    order = H.diagonal().argsort(descending=True)
    rounded = torch.empty_like(W)
    rounded[:, order] = _rounded(W[:, order], H[order][:, order], steps[:, order], format_name)
    return QuantizedTensor(encode_scaled(rounded / steps, format_name), scales, format_name, rotation)


def quantize_layer(
    name: str, weight: Tensor, moments: Tensor, precision: Precision, scale_dtype: torch.dtype
) -> QuantizedTensor:
    """Quantize the weight of a layer to a precision by GPTQ.

    Args:
        name: What errors call the weight.
        weight: float ``[N, K]``.
        moments: As for ``gptq``.
        precision: Its formats, group size and rotation; groups fitted.
        scale_dtype: As for ``gptq``.

    Raises:
        FewbitsError: As ``gptq``, with the name.
    """
    try:
        return gptq(
            weight, moments, precision.weights.name,
            group_size=precision.group_size, scale_dtype=scale_dtype, rotation=precision.rotation(weight.shape[1]),
        )  # fmt: skip
    except FewbitsError as error:
        raise FewbitsError(f"{name}: {error}") from None


def _rounded(W: Tensor, H: Tensor, steps: Tensor, format_name: str) -> Tensor:
    """The weight in multiples of its steps, columns in the order given."""
    H = H.clone()
    dead = H.diagonal() == 0
    H.diagonal()[dead] = 1.0
    H.diagonal().add_(_DAMPING * H.diagonal().mean())
    # Row k of U, the upper Cholesky factor of H⁻¹, says how the columns after k make up for an error in it.
    U = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(H)), upper=True)
    W, rounded = W.clone(), torch.empty_like(W)
    for start in range(0, W.shape[1], _BLOCK):
        stop = min(start + _BLOCK, W.shape[1])
        errors = torch.empty_like(W[:, start:stop])
        for k in range(start, stop):
            step = steps[:, k]
            rounded[:, k] = nearest_values(W[:, k] / step, format_name) * step
            error = (W[:, k] - rounded[:, k]) / U[k, k]
            W[:, k:stop] -= error[:, None] * U[k, k:stop]
            errors[:, k - start] = error
        W[:, stop:] -= errors @ U[start:stop, stop:]
    return rounded
