"""Quantizing weights by the compiled kernel: bit-equal to ``tensors.quantized``, which says what it means."""

from __future__ import annotations

import torch
from torch import Tensor

from fewbits.kernels import native

_MOST_IN_A_GROUP = 1024  # of codes that share bytes: what the kernel has room for


def quantize_weight(
    weight: Tensor,
    codes: Tensor,
    scales: Tensor,
    *,
    group_size: int,
    rotation: int,
    divisor: float,
    lowest: int,
    largest: int,
    packed: bool,
    threads: int | None = None,
) -> bool:
    """Fill codes and scales, if there is a kernel for it.

    Args:
        weight: ``[N, K]``.
        codes: int8 ``[N, K]``, or uint8 ``[N, K/2]`` if packed; contiguous.
        scales: ``[N, K / group_size]``, contiguous.
        group_size: Input features that share a scale.
        rotation: Block of features that each row is rotated by first; 0: none.
        divisor: The scale is the largest magnitude divided by this, rounded up.
        lowest: The least code.
        largest: The greatest code.
        packed: Whether two codes lie in a byte.
        threads: How many work on it; None: as many as torch uses.

    Returns:
        False if there is no kernel for these dtypes, or a weight or scale was not finite: nothing is filled then that
        means anything.
    """
    plain = (torch.float32, torch.bfloat16)
    if not native.status().loaded or weight.device.type != "cpu" or weight.dtype not in plain:
        return False
    if scales.dtype not in plain or weight.numel() == 0 or (packed and group_size > _MOST_IN_A_GROUP):
        return False
    weight = weight.detach().contiguous()
    exact = scales if scales.dtype == torch.float32 else scales.float()
    bad = native.module().quantize_weight(
        weight.data_ptr(), *weight.shape, group_size, rotation, weight.dtype == torch.bfloat16,
        scales.dtype == torch.bfloat16, packed, divisor, lowest, largest, codes.data_ptr(), exact.data_ptr(),
        threads or torch.get_num_threads(),
    )  # fmt: skip
    if bad:
        return False
    if exact is not scales:
        scales.copy_(exact)
    return True
