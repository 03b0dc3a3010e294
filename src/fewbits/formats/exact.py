"""Codes to numbers and back in exact rational arithmetic: slow, obviously right, the judge of everything faster.

Finite values are `fractions.Fraction`; what a fraction cannot be, -0, Inf and NaN, is a float. Rounding looks for the
two neighbours of a number by bisection over the codes, whose values ascend, and then chooses between them.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from fractions import Fraction
from functools import cache
from typing import NamedTuple

from fewbits.errors import FewbitsError
from fewbits.formats.format import Format, Kind, Specials
from fewbits.formats.rounding import RANDOM_BITS, Overflow, Rounding

Exact = Fraction | float
"""A `Fraction`, or one of the floats -0.0, inf, -inf, nan."""


_LISTED_BITS = 16  # formats up to this width are searched in a list of their values, wider ones by computing them
_CODEBOOK_RANDOM_BITS = 24  # so many that a double holds gap · random / 2^24 between float32 levels exactly


class Fields(NamedTuple):
    """The bit fields of a code as unsigned integers; a field that the format does not have is 0."""

    sign: int
    exponent: int
    mantissa: int


def split(code: int, fmt: Format) -> Fields:
    """Cut a code into its fields.

    Raises:
        FewbitsError: the code is negative or has more bits than the fmt.
    """
    _check_code(code, fmt)
    sign, magnitude = divmod(code, fmt.sign_bit)
    return Fields(sign, *divmod(magnitude, 1 << fmt.mantissa_bits))


def decode(code: int, fmt: Format) -> Exact:
    """The number that a code means; of a block fmt, that of an element before scaling.

    Raises:
        FewbitsError: the code is negative or has more bits than the fmt.
    """
    _check_code(code, fmt)
    if fmt.kind is Kind.CODEBOOK:
        return Fraction(fmt.codebook[code])
    negative, magnitude = divmod(code, fmt.sign_bit)
    if fmt.twos_complement:
        return fmt.magnitude(fmt.sign_bit - magnitude) * -1 if negative else fmt.magnitude(magnitude)
    if _is_nan(code, fmt):
        return math.nan
    if magnitude == fmt.inf_code:
        return -math.inf if negative else math.inf
    value = fmt.magnitude(magnitude)
    if negative:
        return -value if value else -0.0
    return value


def encode(
    value: Exact | int,
    fmt: Format,
    rounding: str = Rounding.NEAREST_EVEN,
    overflow: str | None = None,
    random: int | None = None,
) -> int:
    """The code that a number becomes.

    NaN becomes `fmt.nan_code`. -0 keeps its sign where the format has -0. Inf and numbers beyond the range follow
    the overflow rule. A negative number in an unsigned format becomes NaN if there is one (e8m0fnu), else 0; a number
    below the smallest value of a format without zero (e8m0fnu) becomes that value, 0 as well.

    Args:
        value: a number, exact: a float counts for its exact value.
        fmt: any format; of a block fmt, its element.
        rounding: a name in `Rounding`.
        overflow: a name in `Overflow`; None is `ieee` if the format has Inf, else `saturate`.
        random: an integer of `RANDOM_BITS` bits, for stochastic rounding only.

    Raises:
        FewbitsError: unknown rounding or overflow, a rule the format cannot follow, or a missing random integer.
    """
    fmt = fmt.element
    mode, rule = Rounding.named(rounding), fmt.overflow_rule(overflow)
    if (mode is Rounding.STOCHASTIC) != (random is not None):
        raise FewbitsError(f"rounding {str(mode)!r} with random={random}: only stochastic takes one, and needs it")
    if isinstance(value, float) and math.isnan(value):
        return fmt.nan_code
    negative = value < 0 or (fmt.signed and isinstance(value, float) and math.copysign(1.0, value) < 0)
    away = {Rounding.UP: not negative, Rounding.DOWN: negative}.get(mode)  # None: the mode is symmetric
    if fmt.kind is Kind.CODEBOOK:
        return _nearest_level(value, fmt, mode, random)
    limit = fmt.max_code + int(negative and fmt.twos_complement and not fmt.narrow)
    if isinstance(value, float) and math.isinf(value):
        return _signed(_infinity(fmt, rule, limit), negative, fmt)
    magnitude = abs(Fraction(value))
    lower = _last_at_most(magnitude, fmt, limit + 1)
    code = max(lower, 0)
    if lower >= 0 and lower <= limit and _leaves_lower(magnitude, lower, fmt, mode, away, random):
        code = lower + 1
    if code > limit:
        stops = mode is Rounding.TOWARD_ZERO or away is False
        code = limit if stops or rule is Overflow.SATURATE else _infinity(fmt, rule, limit)
    return _signed(code, negative, fmt)


def ulp(value: Exact | int, fmt: Format) -> Fraction:
    """The unit in the last place: the gap between the two neighbours of a finite number, in the format's range."""
    if fmt.kind is Kind.CODEBOOK:
        index = min(max(bisect_right(fmt.codebook, value), 1), len(fmt.codebook) - 1)
        return Fraction(fmt.codebook[index]) - Fraction(fmt.codebook[index - 1])
    lower = max(_last_at_most(abs(Fraction(value)), fmt, fmt.max_code), 0)
    return fmt.magnitude(lower + 1) - fmt.magnitude(lower)


def neighbours(value: Exact | int, fmt: Format) -> tuple[Fraction | None, Fraction | None]:
    """The largest finite value strictly below a number and the smallest strictly above; None where there is none."""
    if isinstance(value, float) and math.isnan(value):
        return None, None
    top = fmt.max_code + int(fmt.twos_complement and not fmt.narrow)
    least = -top if fmt.signed and fmt.kind is not Kind.CODEBOOK else 0
    low, high = least - 1, fmt.max_code + 1  # ordinals: the finite values are numbered in ascending order
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if _ordinal_value(middle, fmt) < value else (low, middle)
    below = _ordinal_value(low, fmt) if low >= least else None
    if high <= fmt.max_code and _ordinal_value(high, fmt) == value:
        high += 1
    above = _ordinal_value(high, fmt) if high <= fmt.max_code else None
    return below, above


def _ordinal_value(ordinal: int, fmt: Format) -> Fraction:
    if fmt.kind is Kind.CODEBOOK:
        return Fraction(fmt.codebook[ordinal])
    return fmt.magnitude(ordinal) if ordinal >= 0 else -fmt.magnitude(-ordinal)


def _last_at_most(magnitude: Fraction, fmt: Format, last: int) -> int:
    """The largest magnitude code, at most `last`, whose value is at most `magnitude`; -1 if even code 0 is larger."""
    if fmt.bits <= _LISTED_BITS:
        return bisect_right(_magnitudes(fmt), magnitude, hi=last + 1) - 1
    return bisect_right(range(last + 1), magnitude, key=fmt.magnitude) - 1


@cache
def _magnitudes(fmt: Format) -> tuple[Fraction, ...]:
    """The values of all magnitude codes, and of one more: what overflows to the largest is nearer than that."""
    return tuple(fmt.magnitude(code) for code in range(fmt.sign_bit + 2))


def _leaves_lower(
    magnitude: Fraction, lower: int, fmt: Format, mode: Rounding, away: bool | None, random: int | None
) -> bool:
    """Whether a magnitude between code `lower` and the next one takes the next one."""
    low, high = fmt.magnitude(lower), fmt.magnitude(lower + 1)
    fraction = (magnitude - low) / (high - low)  # in [0, 1)
    if fraction == 0:
        return False
    # The significand's last bit is the code's, but a one-bit significand (no mantissa) is 1, odd, for every code but 0.
    odd = lower % 2 == 1 if fmt.mantissa_bits else lower > 0 or not fmt.has_subnormals
    return _chooses_upper(fraction, odd, mode, away, random)


def _chooses_upper(
    fraction: Fraction, odd: bool, mode: Rounding, away: bool | None, random: int | None, random_bits: int = RANDOM_BITS
) -> bool:
    """Whether a number `fraction` of the way from the lower magnitude to the upper takes the upper one."""
    if away is not None:
        return away and fraction > 0
    if mode is Rounding.TOWARD_ZERO:
        return False
    if mode is Rounding.STOCHASTIC:
        # Adding random bits below the last kept bit and truncating: a carry out of them is a step up.
        return math.floor(fraction * (1 << random_bits)) + (random or 0) >= 1 << random_bits
    half = Fraction(1, 2)
    return fraction > half or (fraction == half and (odd or mode is Rounding.NEAREST_AWAY))


def _infinity(fmt: Format, rule: Overflow, limit: int) -> int:
    """The magnitude code that Inf becomes; `limit` is the largest finite one."""
    if rule is Overflow.SATURATE:
        return limit
    return fmt.nan_code if fmt.inf_code is None else fmt.inf_code


def _signed(code: int, negative: bool, fmt: Format) -> int:
    """Put the sign on a magnitude code. NaN carries none."""
    if not negative or _is_nan(code, fmt):
        return code
    if fmt.twos_complement:
        return -code % (2 * fmt.sign_bit)
    if not fmt.signed:
        is_zero = fmt.magnitude(code) == 0
        return code if is_zero else fmt.nan_code if fmt.has_nan else 0
    return code if code == 0 and not fmt.has_negative_zero else code | fmt.sign_bit


def _nearest_level(value: Exact | int, fmt: Format, mode: Rounding, random: int | None) -> int:
    """Round to a codebook; it saturates, and a tie goes to the even index."""
    levels = fmt.codebook
    if value <= levels[0] or value >= levels[-1]:
        return 0 if value <= levels[0] else len(levels) - 1
    upper = bisect_right(levels, value)
    lower = upper - 1
    if value == levels[lower]:
        return lower
    if value < 0:  # the neighbours as magnitudes: the inner one first
        lower, upper = upper, lower
    inner, outer = abs(Fraction(levels[lower])), abs(Fraction(levels[upper]))
    fraction = (abs(Fraction(value)) - inner) / (outer - inner)
    away = {Rounding.UP: value > 0, Rounding.DOWN: value < 0}.get(mode)
    odd = lower % 2 == 1
    bits = _CODEBOOK_RANDOM_BITS
    random = None if random is None else random >> (RANDOM_BITS - bits)
    return upper if _chooses_upper(fraction, odd, mode, away, random, bits) else lower


def _is_nan(code: int, fmt: Format) -> bool:
    magnitude = code & (fmt.sign_bit - 1)
    if fmt.specials is Specials.IEEE:
        return magnitude > (fmt.inf_code or 0)
    if fmt.specials is Specials.FN:
        return magnitude == fmt.sign_bit - 1
    return fmt.specials in (Specials.FNUZ, Specials.P3109) and code == fmt.sign_bit


def _check_code(code: int, fmt: Format) -> None:
    if not 0 <= code < 1 << fmt.bits:
        raise FewbitsError(f"code {code:#x} is out of range: {fmt.name} has codes 0x0 to {(1 << fmt.bits) - 1:#x}")
