"""One number as each format sees it. The text fits 80 columns and reads the same without colour."""

from __future__ import annotations

import math
from collections.abc import Iterable
from fractions import Fraction
from typing import Any, NamedTuple

from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from fewbits.formats import Format, Rounding, exact, exact_block, literal
from fewbits.report.cells import bits, exactly, hexadecimal, short


class Seen(NamedTuple):
    """A number in one format.

    Attributes:
        fmt: the format.
        code: the code that the number becomes; of a block format, of the element. None for stochastic rounding.
        became: the exact value of the code.
        below: the largest finite value of the format strictly below the number; None if there is none.
        above: the smallest strictly above.
        scale: the scale of a block of this one number; 1 for the other formats.
        scale_code: its code; None for the other formats.
    """

    fmt: Format
    code: int | None
    became: exact.Exact
    below: Fraction | None
    above: Fraction | None
    scale: Fraction
    scale_code: int | None


def number_table(number: str, formats: Iterable[str], rounding: str = "nearest_even") -> RenderableType:
    """One number as each format sees it: its bits, the value it becomes, the error, the neighbours.

    Args:
        number: a decimal (read exactly), fraction, hex float, inf, nan, or bit pattern; see `fewbits.formats.literal`.
        formats: names of formats. A block format sees a block of this one number.
        rounding: a name in `fewbits.formats.Rounding`; stochastic is drawn as its two outcomes, the neighbours.

    Raises:
        FewbitsError: not a number, an unknown format or rounding.
    """
    value, reading, seen = _look(number, formats, rounding)
    head = Text(number.strip(), style="bold")
    if reading:
        head.append(f"  {reading}: {exactly(value)}", style="not bold")
    if rounding != Rounding.NEAREST_EVEN:
        head.append(f"  rounding {Rounding.named(rounding)}", style="not bold")
    return Group(head, *(Padding(_as_seen(value, one), (1, 0, 0, 0)) for one in seen))


def number_data(number: str, formats: Iterable[str], rounding: str = "nearest_even") -> dict[str, Any]:
    """The same as plain data for JSON. Numbers are exact, as text: decimals, fractions, or `5 × 2^-1074`.

    Raises:
        FewbitsError: not a number, an unknown format or rounding.
    """
    value, _, seen = _look(number, formats, rounding)
    rows = [
        {
            "format": one.fmt.name,
            "code": one.code,
            "bits": None if one.code is None else str(bits(one.code, one.fmt)),
            "becomes": None if one.code is None else exactly(one.became),
            "error": None if one.code is None else _error(value, one),
            "below": None if one.below is None else exactly(one.below),
            "above": None if one.above is None else exactly(one.above),
            "scale": _scale(one),
        }
        for one in seen
    ]
    return {"number": exactly(value), "rounding": str(Rounding.named(rounding)), "formats": rows}


def _look(number: str, formats: Iterable[str], rounding: str) -> tuple[exact.Exact, str, list[Seen]]:
    chosen = [Format.named(name) for name in formats]
    mode = Rounding.named(rounding)
    value, reading = literal.parse(number, chosen)
    return value, reading, [_see(value, fmt, mode) for fmt in chosen]


def _see(value: exact.Exact, fmt: Format, mode: Rounding) -> Seen:
    scale, scale_code, scaled = Fraction(1), None, value
    if fmt.block is not None and math.isfinite(value):
        tensor = exact_block.tensor_scale([value]) if fmt.block.tensor_scale else Fraction(1)
        scale_code = exact_block.block_scale([value], fmt, tensor=tensor)
        scale = Fraction(exact.decode(scale_code, Format.named(fmt.block.scale))) * tensor or Fraction(1)
        scaled = value if value == 0 else Fraction(value) / scale
    below, above = (None if side is None else side * scale for side in exact.neighbours(scaled, fmt.element))
    if mode is Rounding.STOCHASTIC:
        return Seen(fmt, None, math.nan, below, above, scale, scale_code)
    if fmt.block is not None and scale_code is None:
        return Seen(fmt, 0, math.nan, None, None, scale, Format.named(fmt.block.scale).nan_code)
    code = exact.encode(scaled, fmt.element, mode)
    became = exact.decode(code, fmt.element)
    return Seen(fmt, code, became * scale if isinstance(became, Fraction) else became, below, above, scale, scale_code)


def _as_seen(value: exact.Exact, one: Seen) -> RenderableType:
    """One format's part of the number table: its name and code, then a row for each thing to say."""
    rows = Table.grid(padding=(0, 1, 0, 0))
    rows.add_column(no_wrap=True)
    rows.add_column(overflow="fold")
    head = Text(one.fmt.name, style="bold")
    if one.code is not None:
        head.append(f"  {hexadecimal(one.code, one.fmt)}", style="not bold")
        rows.add_row("bits", bits(one.code, one.fmt))
    if one.scale_code is not None and one.fmt.block is not None:
        scale_format = Format.named(one.fmt.block.scale)
        rows.add_row("scale", f"{_scale(one)}  {hexadecimal(one.scale_code, scale_format)} in {scale_format}")
    if one.code is not None:
        rows.add_row("becomes", exactly(one.became))
        rows.add_row("error", _error(value, one))
    rows.add_row("below", "none" if one.below is None else exactly(one.below))
    rows.add_row("above", "none" if one.above is None else exactly(one.above))
    return Group(head, Padding(rows, (0, 0, 0, 2)))


def _scale(one: Seen) -> str | None:
    """The scale of a block of one, None for the other formats."""
    if one.scale_code is None or one.fmt.block is None:
        return None
    return "nan" if one.scale_code == Format.named(one.fmt.block.scale).nan_code else exactly(one.scale)


def _error(value: exact.Exact, one: Seen) -> str:
    """The error, absolute and in units in the last place of the format at the number."""
    element, became = one.fmt.element, one.became
    largest = Fraction(max(element.max, -element.min)) * one.scale
    if not math.isfinite(value):
        kept = value == became or (math.isnan(value) and math.isnan(became))
        return "none" if kept else f"the format holds no {'NaN' if math.isnan(value) else 'Inf'}"
    if math.isnan(became) and element.signed is False and value < 0:
        return "the format holds no negative numbers"
    if not math.isfinite(became):
        without = ", and no Inf" if math.isnan(became) else ""
        return f"overflow: beyond the largest value, {short(element.max)}{without}"
    error = Fraction(became) - Fraction(value)
    if error == 0:
        return "none: exact"
    ulps = error / (exact.ulp(Fraction(value) / one.scale, element) * one.scale)
    note = "  underflow to zero" if became == 0 else ""
    if abs(Fraction(value)) > largest:
        note = f"  saturated at {short(float(became))}"
    return f"{literal.approximate(error)}  {literal.approximate(ulps)} ULP{note}"
