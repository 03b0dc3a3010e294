"""The most memory that a model takes while it runs, measured: its weights, cache and activations.

On the CPU that is the growth of the process's resident memory (RSS): the most that it held while the model read a
prompt and wrote tokens, less what it held before the model was loaded. Python and the libraries are not counted, but
for those parts of them that come into memory with the first model. On a GPU it is what PyTorch's allocator gave out.
"""

from __future__ import annotations

import ctypes
import gc
import platform
from pathlib import Path

import torch

from fewbits.measure.memory import peak_resident_bytes, resident_bytes

_CLEAR_REFS = Path("/proc/self/clear_refs")
_RESET_PEAK = "5"  # proc(5): the high-water mark becomes what is resident now


class PeakMemory:
    """Made before a model is loaded; restarted before it runs; asked afterwards."""

    def __init__(self, device: str = "cpu") -> None:
        self._gpu = device != "cpu"
        gc.collect()  # modules can hold each other in cycles
        _give_back()
        self._before = torch.cuda.memory_allocated() if self._gpu else resident_bytes()

    def restart(self) -> bool:
        """Begin to look for the peak; False where the system cannot (only Linux can)."""
        if self._gpu:
            torch.cuda.reset_peak_memory_stats()
            return True
        _give_back()
        try:
            _CLEAR_REFS.write_text(_RESET_PEAK)
        except OSError:
            return False
        return True

    def grown(self) -> int:
        """Bytes of the peak since `restart`, above what was held before the model was loaded."""
        peak = torch.cuda.max_memory_allocated() if self._gpu else peak_resident_bytes()
        return max(0, peak - self._before)


def _give_back() -> None:
    """Let the system have what is freed already: it would be counted as held, or hide growth."""
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)
