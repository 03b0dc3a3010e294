"""Numbers as people write them, read exactly: `0.1` is one tenth here, not the double next to it."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from fractions import Fraction

from fewbits.errors import FewbitsError
from fewbits.formats import exact
from fewbits.formats.format import Format

_HEX_FLOAT = re.compile(r"([+-]?)0x([0-9a-f]*)(?:\.([0-9a-f]*))?p([+-]?\d+)")
_PATTERN = re.compile(r"(?:([\w.]+):)?0(x[0-9a-f]+|b[01]+)")
_LARGEST_EXPONENT = 20_000
"""Exponents beyond this, decimal or binary, are refused: the exact fraction would fill the memory."""


def parse(text: str, formats: Sequence[Format] = ()) -> tuple[exact.Exact, str]:
    """Read a number: decimal, fraction, hex float, or the bit pattern of a code.

    - `0.1`, `-2.5e-3`, `1/3`, `inf`, `nan`, `-0`: the number.
    - `0x1.8p-3`: a hex float, as C and `float.hex` write it.
    - `0x3C00`, `0b0011110000000000`: a bit pattern. Its digits say how many bits; it is a code of the first of
      `formats` that has as many. `bf16:0x3C00` names the format.

    Args:
        text: the number.
        formats: where to look for the format of a bit pattern.

    Returns:
        The exact number, and how a bit pattern was read, empty for the others.

    Raises:
        FewbitsError: not a number, a pattern whose width fits none of the formats, or an exponent beyond 20,000.
    """
    word = text.strip().lower().replace("_", "") if "_" in text and ":" not in text else text.strip().lower()
    if match := _PATTERN.fullmatch(word):
        return _pattern(text, match, formats)
    if match := _HEX_FLOAT.fullmatch(word):
        sign, whole, part, power = match.group(1), match.group(2), match.group(3) or "", int(match.group(4))
        if (whole or part) and abs(power) <= _LARGEST_EXPONENT:
            value = Fraction(int(whole + part or "0", 16)) * Fraction(2) ** (power - 4 * len(part))
            return _with_sign(value, sign == "-"), ""
    elif word.lstrip("+-") in ("inf", "infinity", "nan"):
        return float(word), ""
    else:
        power_text = re.search(r"e([+-]?\d+)$", word)
        if power_text is None or abs(int(power_text.group(1))) <= _LARGEST_EXPONENT:
            try:
                return _with_sign(Fraction(word), word.startswith("-")), ""
            except (ValueError, ZeroDivisionError):
                pass
    raise FewbitsError(
        f"{text!r} is not a number: write a decimal (0.1), a fraction (1/3), a hex float (0x1.8p-3), inf, nan, "
        f"or a bit pattern (0x3C00, fp16:0x3C00); exponents up to {_LARGEST_EXPONENT}"
    )


def _with_sign(value: Fraction, negative: bool) -> exact.Exact:
    if negative and value == 0:
        return -0.0
    return -abs(value) if negative else value


def _pattern(text: str, match: re.Match[str], formats: Sequence[Format]) -> tuple[exact.Exact, str]:
    named, digits = match.groups()
    code = int(f"0{digits}", 0)
    if named:
        fmt = Format.named(named)
    else:
        bits = (len(digits) - 1) * (4 if digits[0] == "x" else 1)
        fitting = [fmt for fmt in formats if bits - 4 < fmt.bits <= bits and (digits[0] == "x" or fmt.bits == bits)]
        if not fitting:
            raise FewbitsError(
                f"bit pattern {text!r} has {bits} bits, and none of {', '.join(map(str, formats)) or 'the formats'} "
                f"has as many: name its format, as in fp16:{match.group()}"
            )
        fmt = fitting[0]
    return exact.decode(code, fmt), f"{match.group().split(':')[-1]} read as a code of {fmt}"


def decimal(value: Fraction) -> str:
    """The exact decimal expansion of a fraction whose denominator is a power of two, without an exponent."""
    power = value.denominator.bit_length() - 1
    digits = f"{abs(value.numerator) * 5**power:0{power + 1}d}"
    sign = "-" if value < 0 else ""
    return sign + (f"{digits[:-power]}.{digits[-power:]}" if power else digits)


def dyadic(value: Fraction) -> str:
    """The same number as an integer times a power of two: `5 × 2^-1074`."""
    if value == 0:
        return "0"
    power = 1 - value.denominator.bit_length()
    numerator = value.numerator
    zeros = (numerator & -numerator).bit_length() - 1
    return f"{numerator >> zeros} × 2^{power + zeros}"


def approximate(value: exact.Exact, digits: int = 5) -> str:
    """A short decimal: `6.1035e-05`; right also where the number is out of the range of a double."""
    if isinstance(value, float):
        return f"{value:.{digits}g}"
    if value == 0 or 1e-300 < abs(value) < 1e300:
        return f"{float(value):.{digits}g}"
    exponent = math.floor(_log10(abs(value)))
    scaled = float(value / Fraction(10) ** exponent)
    return f"{scaled:.{digits - 1}f}e{exponent:+03d}"


def _log10(value: Fraction) -> float:
    return math.log10(value.numerator) - math.log10(value.denominator)
