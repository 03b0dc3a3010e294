"""Counter-based random bits: the word of an element depends on the seed and the element's position, nothing else.

So the same seed gives the same bits for any thread count, chunk size, memory layout, or device.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fewbits.errors import FewbitsError

_MASK = 0xFFFFFFFF
_GOLDEN = 0x9E3779B9  # 2^32 / the golden ratio: spreads the high halves of the positions


def random_words(seed: int, positions: Tensor) -> Tensor:
    """One 32-bit random word for each position.

    The integer hash lowbias32 (Christopher Wellons, "Prospecting for Hash Functions", 2018) of position and key, with
    a second key between its two rounds. The keys are the halves of the seed, mixed as splitmix64 does (Steele, Lea,
    Flood, OOPSLA 2014), so that neighbouring seeds are unrelated.

    Args:
        seed: 0 to 2^64 - 1.
        positions: int64, any shape: the row-major index of each element in its tensor.

    Returns:
        int64, the shape of `positions`, values 0 to 2^32 - 1.

    Raises:
        FewbitsError: the seed is out of range.
    """
    key = key_of(seed)
    word = ((positions & _MASK) + (key & _MASK)) & _MASK
    between = ((positions >> 32) * _GOLDEN + (key >> 32)) & _MASK
    # Words are held in int64; a product may wrap at 64 bits, its low 32 bits are right all the same.
    word = word ^ (word >> 16)
    word = (word * 0x7FEB352D) & _MASK
    word = word ^ (word >> 15) ^ between
    word = (word * 0x846CA68B) & _MASK
    return word ^ (word >> 16)


def key_of(seed: int) -> int:
    """The 64 bits that a seed stands for: the seed, mixed."""
    return _splitmix64(check_seed(seed))


def check_seed(seed: int) -> int:
    """The seed itself.

    Raises:
        FewbitsError: not an integer of 64 bits.
    """
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 1 << 64:
        raise FewbitsError(f"seed {seed!r} is out of range: take an integer from 0 to 2^64 - 1")
    return seed


def _splitmix64(seed: int) -> int:
    """One step of splitmix64."""
    mask = (1 << 64) - 1
    z = (seed + 0x9E3779B97F4A7C15) & mask
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
    return z ^ (z >> 31)


def positions_of(start: int, count: int, device: torch.device) -> Tensor:
    """The positions `start` to `start + count - 1`."""
    return torch.arange(start, start + count, dtype=torch.int64, device=device)
