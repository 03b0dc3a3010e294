"""While a model is filled, and for caches that grow, give memory back to the system as soon as a tensor is freed.

glibc keeps freed blocks of up to 32 MiB for later allocations, which is right when a model computes. When it is filled,
tensors of many sizes come and go, and their holes would stay: some hundred MiB beside a model of a GiB.
"""

from __future__ import annotations

import ctypes
import math
import mmap
import platform
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache

import torch
from torch import Tensor

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # malloc.h: M_TRIM_THRESHOLD, M_MMAP_THRESHOLD
_MOST = 32 << 20  # where glibc's own growing threshold ends on 64 bits
_LEAST = 128 << 10  # bytes of a tensor for which pages of its own are worth a call


@contextmanager
def tight_memory(from_bytes: int = 1 << 17) -> Iterator[None]:
    """Within the block, blocks of memory of so many bytes are the system's again when they are freed.

    Elsewhere than with glibc nothing changes. Afterwards the threshold is the largest that glibc itself would reach.
    """
    libc = _glibc()
    if libc is None:
        yield
        return
    libc.mallopt(_MMAP_THRESHOLD, from_bytes)
    try:
        yield
    finally:
        libc.mallopt(_MMAP_THRESHOLD, _MOST)
        libc.mallopt(_TRIM_THRESHOLD, 2 * _MOST)
        libc.malloc_trim(0)


def empty_pages(shape: Sequence[int], like: Tensor) -> Tensor:
    """An empty tensor of the dtype of another, on the CPU in fresh pages of the system's where it is large.

    Of those, what has never been written takes no memory, and all of it is the system's again when the tensor is freed;
    a block from the heap is one that was written before, as a rule.
    """
    nbytes = math.prod(shape) * like.itemsize
    usual = like.device.type != "cpu" or nbytes < _LEAST or not hasattr(mmap, "MAP_PRIVATE")
    if usual or torch.compiler.is_compiling():
        return like.new_empty(shape)
    pages = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return torch.frombuffer(pages, dtype=like.dtype).view(*shape)


@cache
def _glibc() -> ctypes.CDLL | None:
    return ctypes.CDLL(None) if platform.libc_ver()[0] == "glibc" else None
