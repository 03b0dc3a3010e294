"""The shared scale of a block and the codes of its elements in exact arithmetic: the judge of the block casts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction

from fewbits.formats import exact
from fewbits.formats.format import Format, Kind
from fewbits.formats.rounding import Overflow, Rounding, ScaleRule


def tensor_scale(values: Sequence[exact.Exact]) -> Fraction:
    """NVFP4's scale of a whole tensor: amax / (448 · 6) in fp32, at least its smallest positive value, 1 for zeros."""
    fp32 = Format.named("fp32")
    amax = _amax(values)
    if amax == 0:
        return Fraction(1)
    limit = Format.named("e4m3fn").max * Format.named("e2m1fn").max
    code = exact.encode(amax / Fraction(limit), fp32, overflow=Overflow.SATURATE)
    return Fraction(exact.decode(max(code, 1), fp32))


def block_scale(
    values: Sequence[exact.Exact], fmt: Format, rule: str | None = None, tensor: Fraction = Fraction(1)
) -> int:
    """The code of a block's scale.

    A NaN or an Inf in the block makes it NaN. A block of zeros has the smallest scale, in MX 2^-127, in NVFP4 0; any
    other NVFP4 block has at least the smallest positive one, 2^-9.

    Args:
        values: the numbers of the block.
        fmt: a block format.
        rule: a name in `ScaleRule`; None is the format's own.
        tensor: the tensor scale, for NVFP4.
    """
    assert fmt.block is not None
    scale, chosen = Format.named(fmt.block.scale), fmt.scale_rule(rule)
    if not all(math.isfinite(value) for value in values):
        return scale.nan_code
    amax = _amax(values)
    largest = Fraction(fmt.element.max)
    if fmt.block.tensor_scale is not None:
        return max(exact.encode(amax / (largest * tensor), scale), int(amax > 0))
    if amax == 0:
        return 0
    emax = _floor_log2(largest)
    exponent = {
        ScaleRule.FLOOR: _floor_log2(amax) - emax,
        ScaleRule.CEIL: -_floor_log2(1 / amax) - emax,
        ScaleRule.EVEN: _floor_log2(_to_precision(amax, fmt)) - emax,
        ScaleRule.RCEIL: -_floor_log2(largest / amax),
    }[chosen]
    return min(max(exponent + scale.bias, 0), scale.max_code)


def encode_block(
    values: Sequence[exact.Exact],
    fmt: Format,
    rule: str | None = None,
    rounding: str = Rounding.NEAREST_EVEN,
    tensor: Fraction = Fraction(1),
    random: Sequence[int] | None = None,
) -> tuple[int, list[int]]:
    """The code of the scale and the codes of the elements; in a block whose scale is NaN or 0 all elements are 0."""
    assert fmt.block is not None
    code = block_scale(values, fmt, rule, tensor)
    scale = exact.decode(code, Format.named(fmt.block.scale))
    if scale != scale:
        return code, [0] * len(values)
    codes = []
    for index, value in enumerate(values):
        zero = value == 0  # keeps -0, which a fraction cannot
        scaled = value if zero else Fraction(value) / (Fraction(scale) * tensor)
        word = None if random is None else random[index]
        codes.append(exact.encode(scaled, fmt.element, rounding, Overflow.SATURATE, word))
    return code, codes


def _amax(values: Sequence[exact.Exact]) -> Fraction:
    return max((abs(Fraction(value)) for value in values if math.isfinite(value)), default=Fraction(0))


def _floor_log2(value: Fraction) -> int:
    """floor(log2 value), by bit lengths: a logarithm would round."""
    guess = value.numerator.bit_length() - value.denominator.bit_length()
    return guess if Fraction(2) ** guess <= value else guess - 1


def _to_precision(value: Fraction, fmt: Format) -> Fraction:
    """Round to the significant bits of the element, exponents without limit; a tie goes up (torchao's EVEN)."""
    fraction_bits = fmt.mantissa_bits - (fmt.kind is Kind.INTEGER)
    quantum = Fraction(2) ** (_floor_log2(value) - fraction_bits)
    return math.floor(value / quantum + Fraction(1, 2)) * quantum
