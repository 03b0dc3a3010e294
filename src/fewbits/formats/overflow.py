"""What values beyond the range of a format become, as codes."""

from __future__ import annotations

from fewbits.formats.format import Format
from fewbits.formats.rounding import Overflow, Rounding


def overflow_codes(fmt: Format, rounding: Rounding, overflow: Overflow) -> tuple[tuple[int, int], tuple[int, int]]:
    """Magnitude codes of values beyond the range and of Inf; each a pair, for positive and for negative values."""
    limits = fmt.max_code, fmt.max_code + (fmt.twos_complement and not fmt.narrow)
    if overflow is Overflow.SATURATE:
        return limits, limits
    infinity = fmt.nan_code if fmt.inf_code is None else fmt.inf_code
    stops = {  # roundings toward zero stop at the largest finite value
        Rounding.TOWARD_ZERO: (True, True),
        Rounding.UP: (False, True),
        Rounding.DOWN: (True, False),
    }.get(rounding, (False, False))
    beyond = tuple(limit if stop else infinity for limit, stop in zip(limits, stops, strict=True))
    return (beyond[0], beyond[1]), (infinity, infinity)
