"""The GPU that a kernel is launched on, and what it can do."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import cache

import torch

TRITON, FP8, FP8_ROW_WISE = (8, 0), (8, 9), (9, 0)
"""The compute capabilities from which there are Triton's kernels, products of FP8 numbers, and those with a scale for
each row in ``torch._scaled_mm``."""


def can(device: torch.device, needed: tuple[int, int]) -> bool:
    """Whether a GPU has a compute capability; the CPU, where kernels are interpreted, has all."""
    return device.type == "cpu" or _capability(device) >= needed


@cache
def _capability(device: torch.device) -> tuple[int, int]:
    if torch.version.hip is not None:  # AMD's numbers mean something else: Triton's kernels, no other FP8
        return TRITON
    return torch.cuda.get_device_capability(device)


def on(device: torch.device) -> AbstractContextManager[object]:
    """Launch on the GPU that holds the tensors, which need not be the current one."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()
