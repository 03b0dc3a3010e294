"""Histograms of magnitudes: how many values of tensors have each binary exponent.

Each power of two is cut in sixteen, by the first twelve bits of a float32 after its sign. A cut has a bin of its own,
and so has what is between two cuts: whether a value on a cut is rounded up or down is known.

    s eeeeeeee mmmm rrrrrrrrrrrrrrrrrrr         bin = 2 · eeeeeeeemmmm + (r is not 0)
      exponent └──┘ sixteenths                  0: zero; 8160: Inf

The rounding thresholds of 8-bit formats lie on cuts, and those of fp16 and bf16 on one or within 2^-9 of one, so what
a format does to the values follows from the counts. A power-of-two scale moves the counts by 32 bins and loses nothing.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

_DROPPED, _CUTS = 19, 16  # bits of r, cuts of each power of two
_STEPS = 2 * _CUTS  # bins of each power of two
_BIAS = 127
_INFINITE = 255 * _STEPS
_PIECE = 1 << 18  # values: their codes, 1 MiB, stay in a core's second cache


@dataclass(frozen=True)
class Counts:
    """The bins of one tensor, or of several.

    Attributes:
        bins: int64 ``[8161]``; see the picture at the top. NaN is in none.
        largest: The largest finite magnitude.
        nan: How many are NaN.
    """

    bins: Tensor
    largest: float
    nan: int

    @classmethod
    def none(cls, largest: float = 0.0) -> Counts:
        """Of no values at all."""
        return cls(torch.zeros(_INFINITE + 1, dtype=torch.int64), largest, 0)

    @classmethod
    def of(cls, x: Tensor) -> Counts:
        """Count a tensor of any float dtype and shape, in two passes."""
        wide = x.detach().float().reshape(-1)
        low, high = torch.aminmax(wide) if wide.numel() else (torch.zeros(()),) * 2
        nan = 0
        if low.isnan():
            missing = wide.isnan()
            nan, wide = int(missing.sum()), wide[~missing]
        largest = max(-float(low), float(high)) if not nan else float("inf")
        if largest == float("inf"):
            finite = wide[wide.isfinite()].abs()
            largest = float(finite.max()) if finite.numel() else 0.0
        return cls(_binned(wide).cpu(), largest, nan)

    def scaled(self, exponent: int) -> Counts:
        """The counts of the same values times 2^exponent; what leaves the range of float32 stays at its ends."""
        if exponent == 0:
            return self
        moved = torch.zeros_like(self.bins)
        places = torch.arange(1, _INFINITE) + exponent * _STEPS
        moved.index_add_(0, places.clamp(1, _INFINITE - 1), self.bins[1:_INFINITE])
        moved[0], moved[_INFINITE] = self.bins[0], self.bins[_INFINITE]
        return Counts(moved, math.ldexp(self.largest, exponent), self.nan)

    def as_if_zero(self, some: Counts) -> Counts:
        """The counts where ``some`` of the values, not the largest, were zero instead."""
        bins = self.bins - some.bins
        bins[0] += some.bins.sum()
        return Counts(bins, self.largest, self.nan)


def _binned(x: Tensor) -> Tensor:
    """The bins of a flat float32 tensor, a piece at a time in one buffer: large new tensors cost page faults."""
    words = x.view(torch.int32)
    buffers = torch.empty((2, min(_PIECE, words.numel())), dtype=torch.int32, device=x.device)
    bins = torch.zeros(_INFINITE + 1, dtype=torch.int64, device=x.device)
    for start in range(0, words.numel(), _PIECE):
        piece = words[start : start + _PIECE]
        down, up = buffers[:, : piece.numel()]
        torch.bitwise_and(piece, 0x7FFFFFFF, out=down)
        torch.add(down, (1 << _DROPPED) - 1, out=up)  # up to the next cut, if r is not 0
        codes = down.bitwise_right_shift_(_DROPPED).add_(up.bitwise_right_shift_(_DROPPED))
        bins += torch.bincount(codes, minlength=_INFINITE + 1)
    return bins


@dataclass
class Histogram:
    """The counts of all tensors that were added."""

    counts: Counts = field(default_factory=Counts.none)

    def add(self, counts: Counts) -> None:
        """Add those of another tensor."""
        ours = self.counts
        self.counts = Counts(ours.bins + counts.bins, max(ours.largest, counts.largest), ours.nan + counts.nan)
        self.__dict__.pop("_running", None)

    @property
    def values(self) -> int:
        """How many there are: zeros, Inf and NaN too."""
        return int(self.counts.bins.sum()) + self.counts.nan

    @property
    def zeros(self) -> int:
        """How many are zero."""
        return int(self.counts.bins[0])

    @property
    def infinite(self) -> int:
        """How many are ±Inf."""
        return int(self.counts.bins[_INFINITE])

    @cached_property
    def _running(self) -> tuple[list[int], list[float]]:
        """How many values that are not zero are in the bins before each one, and the sum of their magnitudes."""
        finite = self.counts.bins[:_INFINITE].clone()
        finite[0] = 0
        cuts = (torch.arange(_INFINITE // 2, dtype=torch.int32) << _DROPPED).view(torch.float32).double()
        upper = torch.cat([cuts[1:], cuts.new_tensor([2.0**128])])
        middles = torch.stack([cuts, (cuts + upper) / 2], 1).flatten()
        return [0, *finite.cumsum(0).tolist()], [0.0, *(finite * middles).cumsum(0).tolist()]

    def below(self, limit: float, inclusive: bool = False) -> float:
        """How many finite values that are not zero are below a limit, or at it; inside a bin, as if spread evenly."""
        return _interpolated(self._running[0], limit, inclusive)

    def magnitude_below(self, limit: float, inclusive: bool = False) -> float:
        """The sum of the magnitudes of the finite values below a limit, or at it, from the middles of the bins."""
        return _interpolated(self._running[1], limit, inclusive)

    @property
    def finite(self) -> int:
        """How many are finite and not zero."""
        return self._running[0][-1]

    @property
    def magnitude(self) -> float:
        """The sum of the magnitudes of the finite values."""
        return self._running[1][-1]

    def by_exponent(self) -> dict[int, int]:
        """How many finite values there are for each binary exponent e, 2^e ≤ magnitude < 2^(e+1); none that is 0."""
        sums = self.counts.bins[:_INFINITE].view(-1, _STEPS).sum(1).tolist()
        sums[0] -= self.zeros
        return {place - _BIAS: count for place, count in enumerate(sums) if count}


def _interpolated(running: list[int] | list[float], limit: float, inclusive: bool) -> float:
    """A running sum over the bins, at a magnitude."""
    if limit <= 0:
        return 0.0
    mantissa, exponent = math.frexp(limit)  # limit = mantissa · 2^exponent, mantissa from 1/2 to 1
    if exponent - 1 < 1 - _BIAS:  # float32's subnormals: sixteenths of 2^-126
        place = math.ldexp(limit, _BIAS - 1) * _CUTS
    else:
        place = (exponent - 1 + _BIAS + 2 * mantissa - 1) * _CUTS
    cut = math.floor(place)
    if 2 * cut + 1 >= len(running):
        return float(running[-1])
    if place == cut:
        return float(running[2 * cut + 1 if inclusive else 2 * cut])
    before, after = running[2 * cut + 1], running[2 * cut + 2]
    return before + (place - cut) * (after - before)
