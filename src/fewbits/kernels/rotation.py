"""Rotation by blocks: an orthogonal Hadamard matrix spreads an outlier over its block, so that few bits hurt less.

    y = x Wᵀ = (x R) (W R)ᵀ        R = diag(H, H, …),  H[i][j] = (−1)^popcount(i & j) / √block,  H = Hᵀ = H⁻¹

Weights are rotated once, before they are quantized; activations whenever a layer is used, in block · log2(block)
additions. Source: QuaRot (arXiv 2404.00456), section 3; the matrix is Sylvester's.
"""

from __future__ import annotations

import math
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from fewbits.errors import FewbitsError
from fewbits.kernels.ops import check_activations, define, library

LEAST_BLOCK, MOST_BLOCK = 16, 512


def block_of(K: int) -> int:
    """The largest block, a power of two, that divides K input features; 0 where none from 16 does: no rotation."""
    block = math.gcd(K, MOST_BLOCK)
    return block if block >= LEAST_BLOCK else 0


def _shape(x: Tensor, block: int) -> Tensor:
    check_activations(x)
    K = x.shape[-1]
    if not LEAST_BLOCK <= block <= MOST_BLOCK or block & (block - 1) or K % block:
        raise FewbitsError(
            f"block={block}: a power of two from {LEAST_BLOCK} to {MOST_BLOCK} that divides K = {K} is needed; "
            "block_of(K) gives one"
        )
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _reference(x: Tensor, block: int) -> Tensor:
    y, distance = x.reshape(-1, block), 1
    while distance < block:
        first, second = y.view(-1, block // (2 * distance), 2, distance).unbind(2)
        y, distance = torch.stack((first + second, first - second), 2).view(-1, block), 2 * distance
    return (y * (1 / math.sqrt(block))).view(x.shape)


def _by_triton(x: Tensor, block: int) -> Tensor:
    from fewbits.kernels.cuda import device, rotation  # brings Triton, which takes a second to import

    out = _shape(x, block)
    return rotation.rotate(out, x, block) if device.can(x.device, device.TRITON) else _reference(x, block)


define("rotate", "(Tensor x, int block) -> Tensor", _shape, _reference)
if find_spec("triton") is not None:
    library.impl("rotate", _by_triton, "CUDA")


def _keep_block(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.block = inputs[1]


def _backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
    return rotate(gradient, ctx.block), None  # H is its own transpose


torch.library.register_autograd("fewbits::rotate", _backward, setup_context=_keep_block, lib=library)


def rotate(x: Tensor, block: int) -> Tensor:
    """Multiply each block of features by the orthogonal Hadamard matrix. It is its own inverse.

    A feature that is NaN or Inf makes its whole block NaN.

    Args:
        x: float32 ``[..., K]``, any strides.
        block: Features that are mixed, a power of two from 16 to 512 that divides K.

    Returns:
        float32 ``[..., K]``.

    Raises:
        FewbitsError: If x is not float32, or the block is another.
    """
    result: Tensor = torch.ops.fewbits.rotate(x, block)
    return result
