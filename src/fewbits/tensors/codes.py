"""Rounding to codes and back, for any format, on the bits of doubles: the meaning of every cast, in plain PyTorch.

float32, bfloat16 and float16 are exact as float64, so one routine serves all inputs and rounds once. It works on

    float64   S EEEEEEEEEEE MMMM…M        significand = 1MMMM…M (53 bits, integer), exponent e = E - 1023
              1      11        52

in steps: (1) drop the low bits of the significand that the format has no room for, more of them below its smallest
normal value; (2) decide from the dropped bits whether to go one up; (3) put exponent and significand together, so
that a carry out of the significand is a step of the exponent by itself; (4) overflow; (5) sign, Inf and NaN.

There is no logarithm and no multiplication: both round, and would round a second time.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from fewbits.formats import Format, Kind, Overflow, Rounding, Specials
from fewbits.formats.overflow import overflow_codes
from fewbits.formats.rounding import RANDOM_BITS

_MANTISSA = 52
_IMPLICIT = 1 << _MANTISSA
_INF = 0x7FF << _MANTISSA
_MAGNITUDE = (1 << 63) - 1

CHUNK = 1 << 14
"""Elements rounded at a time on a CPU: the int64 intermediates of so many stay in its caches, and torch does not start
threads for them, which at 2^15 elements costs more than it brings (measured with a second process at work)."""

DECODE_TABLE_BITS = 16
"""Formats up to this width decode by looking codes up in a table of all values."""


@dataclass(frozen=True)
class How:
    """How to round: the choices of one cast, checked.

    Attributes:
        rounding: which neighbour.
        overflow: what becomes of values beyond the range.
        seed: for stochastic rounding; None for all others.
    """

    rounding: Rounding
    overflow: Overflow
    seed: int | None = None


def to_codes(
    values: Tensor, fmt: Format, how: How, random: Tensor | None = None, scale_exponent: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Round each value to its code, once.

    Args:
        values: float64, any shape.
        fmt: any format of at most 52 mantissa bits; of a block format, its element.
        how: the rounding and the overflow rule.
        random: int64 words of 32 bits, the shape of `values`, for stochastic rounding.
        scale_exponent: int64, broadcastable: the value that is rounded is values · 2^-scale_exponent.

    Returns:
        The codes, int64, and a bool mask of the values that overflowed, both of the shape of `values`. See
        `fewbits.formats.exact.encode` for what NaN, Inf, -0 and negative numbers become; this is bit-equal to it.
    """
    if fmt.kind is Kind.CODEBOOK:
        return _to_levels(values, fmt, how.rounding, random)
    bits = values.contiguous().view(torch.int64)
    negative = bits < 0
    bits = bits & _MAGNITUDE
    if not fmt.signed:
        negative = negative & (bits != 0)  # -0 is 0
    is_inf, is_nan = bits == _INF, bits > _INF
    code = _round_magnitude(bits, fmt, how.rounding, negative, random, scale_exponent)
    limit = fmt.max_code + (negative & True if fmt.twos_complement and not fmt.narrow else 0)
    over = (code > limit) | is_inf
    code = torch.where(over, _overflowed(fmt, how, negative, is_inf), code)
    code = _with_sign(code, negative, fmt)
    return torch.where(is_nan, fmt.nan_code, code), over & ~is_nan


def _round_magnitude(
    bits: Tensor, fmt: Format, mode: Rounding, negative: Tensor, random: Tensor | None, scale_exponent: Tensor | None
) -> Tensor:
    """The magnitude code of doubles without sign, as if the format's exponents went on for ever."""
    field = bits >> _MANTISSA
    exponent = field.clamp(min=1) - 1023
    if scale_exponent is not None:
        exponent = exponent - scale_exponent
    significand = (bits & (_IMPLICIT - 1)) | ((field > 0).to(torch.int64) << _MANTISSA)
    above = exponent - fmt.emin  # exponents above the smallest normal one; negative in the subnormal range
    if fmt.mantissa_bits == _MANTISSA:
        return bits  # fp64 itself: nothing to drop
    # (1) a normal value drops 52 - mantissa_bits bits, a subnormal one as many more as its exponent is too small
    drop = (_MANTISSA - fmt.mantissa_bits) - above.clamp(max=0)
    shift = drop.clamp(max=_MANTISSA + 2)  # enough to leave nothing and to be less than half
    kept = significand >> shift
    rest = significand - (kept << shift)
    # (2)
    if mode is Rounding.NEAREST_EVEN:
        kept = kept + (rest + (kept & 1) > (1 << (shift - 1)))  # beyond half, or half and odd
    elif mode is Rounding.NEAREST_AWAY:
        kept = kept + (rest >= (1 << (shift - 1)))
    elif mode is Rounding.UP:
        kept = kept + ((rest > 0) & ~negative)
    elif mode is Rounding.DOWN:
        kept = kept + ((rest > 0) & negative)
    elif mode is Rounding.STOCHASTIC:
        assert random is not None
        deep = drop.clamp(max=_MANTISSA + 1 + RANDOM_BITS)
        first = torch.where(  # the first 32 dropped bits
            deep >= RANDOM_BITS,
            rest >> (deep - RANDOM_BITS).clamp(min=0),
            rest << (RANDOM_BITS - deep).clamp(min=0),
        )
        kept = kept + ((first + random) >> RANDOM_BITS)  # a carry out of them is a step up
    # (3) the significand's implicit bit, where there is one, adds the 1 that makes exponent field 0 into 1
    code = (above.clamp(min=0) << fmt.mantissa_bits) + kept
    if fmt.has_subnormals:
        return code
    return torch.where((above < 0) | (bits == 0), 0, code - (1 << fmt.mantissa_bits))


def _overflowed(fmt: Format, how: How, negative: Tensor, is_inf: Tensor) -> Tensor:
    """(4) The magnitude code of values beyond the range: the largest finite one, Inf or NaN."""
    beyond, infinite = overflow_codes(fmt, how.rounding, how.overflow)
    return torch.where(is_inf, torch.where(negative, *infinite[::-1]), torch.where(negative, *beyond[::-1]))


def _with_sign(code: Tensor, negative: Tensor, fmt: Format) -> Tensor:
    """(5) Put the sign on magnitude codes; the NaN of overflow has none."""
    if fmt.twos_complement:
        return torch.where(negative, -code & (2 * fmt.sign_bit - 1), code)
    if not fmt.signed:
        below_zero = negative & (code > 0) if fmt.has_subnormals else negative
        return torch.where(below_zero, fmt.nan_code if fmt.has_nan else 0, code)
    signed = negative
    if not fmt.has_negative_zero:
        signed = signed & (code > 0) & (code != fmt.nan_code)
    elif fmt.specials is Specials.FN:
        signed = signed & (code != fmt.nan_code)
    return code | (signed.to(torch.int64) << (fmt.bits - 1))


def _to_levels(values: Tensor, fmt: Format, mode: Rounding, random: Tensor | None) -> tuple[Tensor, Tensor]:
    """Round to a codebook: compare with a threshold between each pair of neighbours."""
    levels = torch.tensor(fmt.codebook, dtype=torch.float64, device=values.device)
    is_nan = values.isnan()
    inside = values.nan_to_num(nan=0.0, posinf=torch.inf, neginf=-torch.inf).clamp(levels[0], levels[-1])
    lower = torch.zeros_like(inside, dtype=torch.int64)  # counted: searchsorted starts threads for every chunk
    for level in fmt.codebook[1:-1]:
        lower += inside >= level
    low, high = _look_up(levels, lower), _look_up(levels, lower + 1)
    if mode in (Rounding.NEAREST_EVEN, Rounding.NEAREST_AWAY):
        middle = (low + high) / 2  # exact: the levels are float32
        even_above = lower % 2 == 1 if mode is Rounding.NEAREST_EVEN else inside > 0
        up = (inside > middle) | ((inside == middle) & even_above)
    elif mode is Rounding.STOCHASTIC:
        assert random is not None
        # Up from |x| >= inner + gap · (1 - random / 2^32); the product is exact, 26 + 27 bits, with 24 random bits.
        share = (random >> 8).to(torch.float64) * 2.0**-24
        share = torch.where(low < 0, share, 1 - share)
        threshold = low + (high - low) * share
        up = torch.where(low < 0, inside > threshold, inside >= threshold)
    else:
        up = {
            Rounding.UP: inside > low,
            Rounding.DOWN: inside == high,
            Rounding.TOWARD_ZERO: torch.where(low < 0, inside > low, inside == high),
        }[mode]
    codes = torch.where(is_nan, fmt.nan_code, lower + up)
    return codes, (values < levels[0]) | (values > levels[-1])


def to_values(codes: Tensor, fmt: Format, dtype: torch.dtype) -> Tensor:
    """The number that each code means; of a block format, that of its element.

    Args:
        codes: integers of any dtype and shape, all in range.
        fmt: any format.
        dtype: float64, float32, bfloat16 or float16. A value that it does not hold is rounded to nearest even, once.

    Returns:
        `dtype`, the shape of `codes`.
    """
    if fmt.bits <= DECODE_TABLE_BITS:
        return _look_up(_table(fmt, dtype, str(codes.device)), codes.to(torch.int32))
    # uint64 becomes int64 bit for bit: a negative code is the same code
    return to_dtype(_decode(codes.to(torch.int64), fmt), dtype)


def _look_up(table: Tensor, index: Tensor) -> Tensor:
    """table[index]; index_select is many times faster at it than indexing (torch 2.13, CPU)."""
    return table.index_select(0, index.reshape(-1)).reshape(index.shape)


@lru_cache(maxsize=64)
def _table(fmt: Format, dtype: torch.dtype, device: str) -> Tensor:
    return to_dtype(_decode(torch.arange(1 << fmt.bits), fmt), dtype).to(device)


def _decode(codes: Tensor, fmt: Format) -> Tensor:
    """Assemble the double of each code from its fields."""
    if fmt.kind is Kind.CODEBOOK:
        return torch.tensor(fmt.codebook, dtype=torch.float64, device=codes.device)[codes]
    negative = (codes >> (fmt.bits - 1)) & 1 != 0 if fmt.signed else torch.zeros_like(codes, dtype=torch.bool)
    if fmt.twos_complement:
        return (codes - 2 * fmt.sign_bit * negative).to(torch.float64) * 2.0**-fmt.bias
    magnitude = codes & (fmt.sign_bit - 1)
    field, mantissa = magnitude >> fmt.mantissa_bits, magnitude & ((1 << fmt.mantissa_bits) - 1)
    first = 1 if fmt.has_subnormals else 0
    normal = ((field - first + fmt.emin + 1023) << _MANTISSA) | (mantissa << (_MANTISSA - fmt.mantissa_bits))
    values = normal.view(torch.float64)
    if fmt.has_subnormals:
        values = torch.where(field == 0, mantissa.to(torch.float64) * 2.0 ** (fmt.emin - fmt.mantissa_bits), values)
    if fmt.inf_code is not None:
        values = torch.where(magnitude == fmt.inf_code, torch.inf, values)
    values = torch.where(negative, -values, values)
    return torch.where(_is_nan(codes, magnitude, fmt), torch.nan, values)


def _is_nan(codes: Tensor, magnitude: Tensor, fmt: Format) -> Tensor:
    if fmt.specials is Specials.IEEE and fmt.inf_code is not None:
        return magnitude > fmt.inf_code
    if fmt.specials is Specials.FN:
        return magnitude == fmt.sign_bit - 1
    return codes == (fmt.sign_bit if fmt.specials in (Specials.FNUZ, Specials.P3109) else -1)


def to_dtype(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Doubles to a float dtype with one rounding; torch 2.13 rounds twice on the way to float16 and bfloat16."""
    name = {torch.float16: "fp16", torch.bfloat16: "bf16"}.get(dtype)
    if name is None:
        return values.to(dtype)
    fmt = Format.named(name)
    codes, _ = to_codes(values, fmt, How(Rounding.NEAREST_EVEN, Overflow.IEEE))
    return codes.to(torch.int16).view(dtype)
