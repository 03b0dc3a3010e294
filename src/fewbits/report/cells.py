"""What a table cell says of a number or a code: exactly, shortly, in bits coloured by field, in hexadecimal."""

from __future__ import annotations

import math

from rich.text import Text

from fewbits.formats import Format, Kind, exact, literal

FIELD_STYLES = ("bold red", "bold green", "bold cyan")
"""Sign, exponent, mantissa."""

_WIDEST_DECIMAL, _WIDEST_INTEGER = 60, 15
"""Exact decimals and integers of more characters than this are shown as an integer times a power of two."""


def exactly(value: exact.Exact) -> str:
    """A number with nothing left out; with a readable approximation where its decimals are many."""
    if isinstance(value, float):
        return "-0.0" if value == 0 else f"{value:g}"
    if value.denominator & (value.denominator - 1):
        return str(value)
    text = literal.decimal(value)
    widest = _WIDEST_INTEGER if value.denominator == 1 else _WIDEST_DECIMAL
    return text if len(text) <= widest else f"{literal.approximate(value)} = {literal.dyadic(value)}"


def short(value: float) -> str:
    """A number in at most 11 characters: integers below a million and powers of two exactly, else five digits."""
    mantissa, exponent = math.frexp(value)
    if mantissa == 0.5 and not -4 < exponent < 17:
        return f"2^{exponent - 1}"
    return f"{value:g}" if value == int(value) and abs(value) < 1e6 else f"{value:.5g}"


def bits(code: int, fmt: Format) -> Text:
    """The code in binary, its fields apart and coloured."""
    text = Text()
    digits = f"{code:0{fmt.bits}b}"
    for width, style in zip(field_widths(fmt), FIELD_STYLES, strict=True):
        if width:
            text.append((" " if text else "") + digits[:width], style=style)
            digits = digits[width:]
    return text


def hexadecimal(code: int, fmt: Format) -> str:
    """The code in as many hexadecimal digits as the format needs."""
    return f"0x{code:0{-(-fmt.bits // 4)}X}"


def field_widths(fmt: Format) -> tuple[int, int, int]:
    """Bits of sign, exponent and mantissa."""
    return int(fmt.signed and fmt.kind is not Kind.CODEBOOK), fmt.exponent_bits, fmt.mantissa_bits
