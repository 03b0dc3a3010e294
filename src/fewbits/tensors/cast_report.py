"""Cast a tensor to another float dtype and count what the cast did to it.

What became of a value follows from its magnitude alone, by thresholds between which nearest_even cannot err:

    0        s/2                n - s/2                max + ulp/2          Inf
    |  zero  ]     subnormal    [        normal        [    overflowed      |        s, n: smallest subnormal, normal
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fewbits.errors import FewbitsError
from fewbits.formats import Format, exact
from fewbits.tensors.cast import encode

_DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
_CHUNK = 1 << 15  # elements: their intermediates stay in a core's second cache, and torch starts no threads for so few

_Floats = NDArray[Any]


@dataclass(frozen=True)
class CastReport:
    """What a cast did to a tensor.

    Attributes:
        tensor: Its name.
        values: How many it has.
        overflowed: Finite values that are beyond the new format: Inf now, or its largest value where it saturates.
        subnormal: Values that became subnormal numbers, which have fewer bits, and were none before.
        zeroed: Values that became zero and were not.
        max_abs_error: Largest absolute error of a value that did not overflow; NaN and Inf are not looked at.
        max_rel_error: Largest error relative to the value, likewise; 1 where a value became zero.
    """

    tensor: str
    values: int
    overflowed: int = 0
    subnormal: int = 0
    zeroed: int = 0
    max_abs_error: float = 0.0
    max_rel_error: float = 0.0


def cast_and_report(tensor: str, x: Tensor, to: str, overflow: str | None = None) -> tuple[Tensor, CastReport]:
    """Cast with one rounding, to nearest even, and say what became of the values.

    NaN stays NaN, Inf stays Inf (saturated: the largest value), -0 stays -0; none of them counts as changed.

    Args:
        tensor: Its name, for the report.
        x: Any real dtype and shape, on the CPU; integers count for their float64 values.
        to: fp32, fp16 or bf16.
        overflow: As in ``round_to``: ``ieee`` (Inf), ``saturate``, or a dialect; None is ``ieee``.

    Returns:
        The tensor in the new dtype, its shape kept, and the report. A tensor that the new dtype holds exactly, or that
        has it already, comes back as ``x.to(dtype)``.

    Raises:
        FewbitsError: Another format, or an unknown overflow rule.
    """
    fmt = Format.named(to)
    if fmt.name not in _DTYPES:
        raise FewbitsError(f"a cast to {fmt.name} is not reported: choose {', '.join(_DTYPES)}, or encode() for codes")
    dtype = _DTYPES[fmt.name]
    if x.dtype == dtype or (dtype == torch.float32 and x.is_floating_point() and x.dtype.itemsize <= 2):
        fmt.overflow_rule(overflow)
        return x.to(dtype), CastReport(tensor, x.numel())
    normal_from = torch.finfo(x.dtype).smallest_normal if x.is_floating_point() else 0.0
    if x.dtype not in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        x = x.to(torch.float32 if x.is_floating_point() else torch.float64)
    codes = encode(x, fmt, overflow=overflow)
    assert isinstance(codes, Tensor)
    cast = codes.view(dtype)
    counter = _Counter(fmt, normal_from)
    with np.errstate(invalid="ignore"):  # Inf - Inf, of values that are then left out
        for before, after in _chunks(x.detach(), cast):
            counter.count(before, after)
    return cast, counter.report(tensor, x.numel())


class _Counter:
    """The counts so far; see the picture at the top."""

    def __init__(self, fmt: Format, normal_from: float) -> None:
        half_smallest = fmt.smallest_subnormal / 2
        self.zero_to = float(half_smallest)
        self.normal_from = float(fmt.smallest_normal - half_smallest)
        self.over_from = float(fmt.max + exact.ulp(fmt.max, fmt) / 2)  # the largest code is odd: the tie overflows
        self.was_normal_from = normal_from
        self.overflowed = self.subnormal = self.zeroed = 0
        self.max_abs_error = self.max_rel_error = 0.0

    def count(self, before: _Floats, after: _Floats) -> None:
        """Add a chunk: its values before and after the cast, of one dtype; ``after`` is overwritten."""
        magnitude = np.abs(before)
        if not magnitude.size:
            return
        if not magnitude.max() < self.over_from:  # NaN too
            finite = magnitude < np.inf
            inside = magnitude < self.over_from
            self.overflowed += int(np.count_nonzero(finite) - np.count_nonzero(inside))
            before, after, magnitude = before[inside], after[inside], magnitude[inside]
            if not magnitude.size:
                return
        small = magnitude < self.normal_from
        if np.count_nonzero(small):
            self._count_small(magnitude[small])
        error = np.abs(np.subtract(after, before, out=after), out=after)  # exact: an error has few bits
        self.max_abs_error = max(self.max_abs_error, float(error.max()))
        np.maximum(magnitude, np.finfo(magnitude.dtype).smallest_subnormal, out=magnitude)  # 0 / 0 is no error
        self.max_rel_error = max(self.max_rel_error, float(np.divide(error, magnitude, out=error).max()))

    def _count_small(self, magnitude: _Floats) -> None:
        to_zero = magnitude <= self.zero_to
        self.zeroed += int(np.count_nonzero(to_zero & (magnitude > 0)))
        self.subnormal += int(np.count_nonzero(~to_zero & (magnitude >= self.was_normal_from)))

    def report(self, tensor: str, values: int) -> CastReport:
        """What was counted."""
        counts = self.overflowed, self.subnormal, self.zeroed
        return CastReport(tensor, values, *counts, self.max_abs_error, self.max_rel_error)


def _chunks(x: Tensor, cast: Tensor) -> Iterator[tuple[_Floats, _Floats]]:
    """Both tensors piece by piece as float64 if x is, else float32, in which 16-bit values are exact."""
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    before, after = x.reshape(-1), cast.reshape(-1)
    buffer = torch.empty(min(_CHUNK, x.numel()), dtype=wide)
    for start in range(0, x.numel(), _CHUNK):
        part = before[start : start + _CHUNK]
        yield part.to(wide).numpy(), buffer[: part.numel()].copy_(after[start : start + _CHUNK]).numpy()
