"""While a model is filled, give memory back to the system as soon as a tensor is freed.

glibc keeps freed blocks of up to 32 MiB for later allocations, which is right when a model computes. When it is filled,
tensors of many sizes come and go, and their holes would stay: some hundred MiB beside a model of a GiB.
"""

from __future__ import annotations

import ctypes
import platform
from collections.abc import Iterator
from contextlib import contextmanager

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # malloc.h: M_TRIM_THRESHOLD, M_MMAP_THRESHOLD
_MOST = 32 << 20  # where glibc's own growing threshold ends on 64 bits


@contextmanager
def tight_memory(from_bytes: int = 1 << 20) -> Iterator[None]:
    """Within the block, blocks of memory of so many bytes are the system's again when they are freed.

    Elsewhere than with glibc nothing changes. Afterwards the threshold is the largest that glibc itself would reach.
    """
    if platform.libc_ver()[0] != "glibc":
        yield
        return
    libc = ctypes.CDLL(None)
    libc.mallopt(_MMAP_THRESHOLD, from_bytes)
    try:
        yield
    finally:
        libc.mallopt(_MMAP_THRESHOLD, _MOST)
        libc.mallopt(_TRIM_THRESHOLD, 2 * _MOST)
        libc.malloc_trim(0)
