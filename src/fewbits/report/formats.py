"""Formats for the eye: all of them in a table, one with its bits drawn, one number as each format sees it.

Every function returns a Rich renderable that fits 80 columns and reads the same without colour.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from fractions import Fraction

from rich import box
from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from fewbits.formats import Format, Kind, Rounding, Specials, exact, literal, names

_FIELD_STYLES = ("bold red", "bold green", "bold cyan")  # sign, exponent, mantissa
_WIDEST_DECIMAL, _WIDEST_INTEGER = 60, 15
"""Exact decimals and integers of more characters than this are shown as an integer times a power of two."""


def formats_table(which: Sequence[str] | None = None) -> RenderableType:
    """All formats, one row each, and below it what each is used for.

    Args:
        which: names of the formats to list; None is the whole catalog.

    Raises:
        FewbitsError: unknown format.
    """
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    table.add_column("format", style="bold", no_wrap=True)
    for heading in ("bits", "s/e/m", "max", "min\nnormal", "min sub-\nnormal", "epsilon", "GB per\n10⁹ par."):
        table.add_column(heading, justify="right", no_wrap=True)
    uses = Table.grid(padding=(0, 2, 0, 0))
    uses.add_column(style="bold", no_wrap=True)
    uses.add_column()
    for fmt in (Format.named(name) for name in which or names()):
        normal, subnormal = _smallest(fmt)
        table.add_row(
            *(fmt.name, _width(fmt), _fields(fmt), _short(fmt.max), normal, subnormal, _epsilon(fmt), _gigabytes(fmt))
        )
        uses.add_row(fmt.name, fmt.use)
    return Group(table, uses)


def one_format(name: str) -> RenderableType:
    """One format: its bit layout drawn, its range and precision, its special codes.

    Raises:
        FewbitsError: unknown format.
    """
    fmt = Format.named(name)
    title = Text.assemble((fmt.name, "bold"), f"  {fmt.use}" if fmt.use else "")
    facts = Table.grid(padding=(0, 3, 0, 0))
    facts.add_column(no_wrap=True)
    facts.add_column(overflow="fold")
    for label, value in _facts(fmt):
        facts.add_row(label, value)
    return Group(title, Padding(_drawing(fmt), (1, 0, 1, 2)), Padding(facts, (0, 0, 0, 2)))


def number_table(number: str, formats: Iterable[str], rounding: str = "nearest_even") -> RenderableType:
    """One number as each format sees it: its bits, the value it becomes, the error, the neighbours.

    Args:
        number: a decimal (read exactly), fraction, hex float, inf, nan, or bit pattern; see `fewbits.formats.literal`.
        formats: names of formats.
        rounding: a name in `fewbits.formats.Rounding`; stochastic is drawn as its two outcomes, the neighbours.

    Raises:
        FewbitsError: not a number, an unknown format or rounding.
    """
    chosen = [Format.named(name) for name in formats]
    mode = Rounding.named(rounding)
    value, reading = literal.parse(number, chosen)
    head = Text(f"{number.strip()}", style="bold")
    if reading:
        head.append(f"  {reading}: {_exactly(value)}", style="not bold")
    if mode is not Rounding.NEAREST_EVEN:
        head.append(f"  rounding {mode}", style="not bold")
    return Group(head, *(Padding(_as_seen(value, fmt, mode), (1, 0, 0, 0)) for fmt in chosen))


def _as_seen(value: exact.Exact, fmt: Format, mode: Rounding) -> RenderableType:
    """One format's part of the number table: its name and code, then a row for each thing to say."""
    rows = Table.grid(padding=(0, 1, 0, 0))
    rows.add_column(no_wrap=True)
    rows.add_column(overflow="fold")
    head = Text(fmt.name, style="bold")
    if mode is not Rounding.STOCHASTIC:
        code = exact.encode(value, fmt, mode)
        became = exact.decode(code, fmt.element)
        head.append(f"  {_hex(code, fmt)}", style="not bold")
        rows.add_row("bits", _bits(code, fmt))
        rows.add_row("becomes", _exactly(became))
        rows.add_row("error", _error(value, became, fmt))
    below, above = exact.neighbours(value, fmt)
    rows.add_row("below", "none" if below is None else _exactly(below))
    rows.add_row("above", "none" if above is None else _exactly(above))
    return Group(head, Padding(rows, (0, 0, 0, 2)))


def _error(value: exact.Exact, became: exact.Exact, fmt: Format) -> str:
    """The error, absolute and in units in the last place of the format at the number."""
    if not math.isfinite(value):
        return "none" if value == became or (math.isnan(value) and math.isnan(became)) else "not finite any more"
    if math.isnan(became):
        return f"overflow: beyond the largest value, {_short(fmt.element.max)}, and no Inf"
    if math.isinf(became):
        return f"overflow: beyond the largest value, {_short(fmt.element.max)}"
    error = Fraction(became) - Fraction(value)
    if error == 0:
        return "none: exact"
    ulps = error / exact.ulp(value, fmt)
    note = "  underflow to zero" if became == 0 else ""
    if abs(Fraction(value)) > Fraction(max(fmt.element.max, -fmt.element.min)):
        note = f"  saturated at {_short(float(became))}"
    return f"{literal.approximate(error)}  {literal.approximate(ulps)} ULP{note}"


def _exactly(value: exact.Exact) -> str:
    """A number with nothing left out; with a readable approximation where its decimals are many."""
    if isinstance(value, float):
        return f"{value:g}".replace("-0", "-0.0") if value == 0 else f"{value:g}"
    if value.denominator & (value.denominator - 1):
        return str(value)
    text = literal.decimal(value)
    widest = _WIDEST_INTEGER if value.denominator == 1 else _WIDEST_DECIMAL
    return text if len(text) <= widest else f"{literal.approximate(value)} = {literal.dyadic(value)}"


def _bits(code: int, fmt: Format) -> Text:
    """The code in binary, its fields apart and coloured."""
    text = Text()
    digits = f"{code:0{fmt.bits}b}"
    for width, style in zip(_field_widths(fmt), _FIELD_STYLES, strict=True):
        if width:
            text.append((" " if text else "") + digits[:width], style=style)
            digits = digits[width:]
    return text


def _drawing(fmt: Format) -> Text:
    """The bit layout with a label to each field."""
    sign, exponent, mantissa = _field_widths(fmt)
    bias = f", bias {fmt.bias}" if exponent else f", {fmt.bias} of them fractional" if fmt.bias else ""
    what = {Kind.FLOAT: "mantissa", Kind.INTEGER: "magnitude, two's complement" if sign else "magnitude"}
    labels = (
        (sign, "S", "sign"),
        (exponent, "E", f"exponent, {_plural(exponent)}{bias}"),
        (
            mantissa,
            "M",
            f"{what.get(fmt.kind, 'index into the codebook')}, {_plural(mantissa)}{'' if exponent else bias}",
        ),
    )
    present = [
        (width, letter, label, style)
        for (width, letter, label), style in zip(labels, _FIELD_STYLES, strict=True)
        if width
    ]
    text = Text()
    for index, (width, letter, _, style) in enumerate(present):
        text.append((" " if index else "") + letter * width, style=style)
    for index in reversed(range(len(present))):
        text.append("\n")
        for width, *_ in present[:index]:
            text.append("│" + " " * width)
        text.append("└ " + present[index][2], style=present[index][3])
    return text


def _facts(fmt: Format) -> list[tuple[str, str | Text]]:
    """Label and value of what there is to say about one format."""
    normal, subnormal = _smallest(fmt)
    size = f"{fmt.bits}" + (f", in words of {fmt.storage_bits}" if fmt.storage_bits else "")
    facts: list[tuple[str, str | Text]] = [
        ("bits", size),
        ("block", _block(fmt)),
        ("memory", f"{_gigabytes(fmt)} GB per billion parameters"),
        ("largest", _with_code(fmt.max_code, fmt)),
        ("least", _short(fmt.min)),
        ("smallest normal", _power(fmt.smallest_normal, normal)),
        ("smallest subnormal", _power(fmt.smallest_subnormal, subnormal)),
        ("epsilon", _power(fmt.eps, _epsilon(fmt))),
        ("Inf", _inf_codes(fmt)),
        ("NaN", _nan_codes(fmt)),
        ("-0", _hex(fmt.sign_bit, fmt) if fmt.has_negative_zero else "none"),
        ("overflow", f"{fmt.overflow_rule(None)} unless told otherwise"),
        ("specification", fmt.section),
        ("also called", ", ".join(fmt.aliases)),
    ]
    return [(label, value) for label, value in facts if value and value != "–"]


def _block(fmt: Format) -> str:
    if fmt.block is None:
        return ""
    tensor = f", and the tensor a scale in {fmt.block.tensor_scale}" if fmt.block.tensor_scale else ""
    return f"{fmt.block.size} values share a scale in {fmt.block.scale}{tensor}"


def _inf_codes(fmt: Format) -> str:
    code = fmt.inf_code
    return "none" if code is None else f"{_hex(code, fmt)}, {_hex(code | fmt.sign_bit, fmt)}"


def _nan_codes(fmt: Format) -> str:
    if fmt.block is not None:
        return f"the whole block, by its scale: {_nan_codes(Format.named(fmt.block.scale))}"
    if not fmt.has_nan:
        return f"none; NaN becomes {_hex(fmt.nan_code, fmt)}"
    if fmt.specials is not Specials.IEEE:
        codes = {fmt.nan_code} | ({fmt.nan_code | fmt.sign_bit} if fmt.signed else set())
        return ", ".join(_hex(code, fmt) for code in sorted(codes))
    first = (fmt.inf_code or 0) + 1
    spans = (f"{_hex(first | sign, fmt)}–{_hex((fmt.sign_bit - 1) | sign, fmt)}" for sign in (0, fmt.sign_bit))
    return f"{', '.join(spans)}; fewbits writes {_hex(fmt.nan_code, fmt)}"


def _field_widths(fmt: Format) -> tuple[int, int, int]:
    return fmt.bits - fmt.exponent_bits - fmt.mantissa_bits, fmt.exponent_bits, fmt.mantissa_bits


def _fields(fmt: Format) -> str:
    return "/".join(map(str, _field_widths(fmt)))


def _width(fmt: Format) -> str:
    return str(fmt.bits)


def _gigabytes(fmt: Format) -> str:
    return f"{float(fmt.bits_per_value / 8):.4g}"


def _smallest(fmt: Format) -> tuple[str, str]:
    if fmt.kind is not Kind.FLOAT:
        return "–", _short(fmt.smallest_subnormal)
    has_subnormals = fmt.has_subnormals and fmt.mantissa_bits > 0
    return _short(fmt.smallest_normal), _short(fmt.smallest_subnormal) if has_subnormals else "–"


def _epsilon(fmt: Format) -> str:
    return _short(fmt.eps)


def _power(value: float, short: str) -> str:
    """`2^-14 = 6.1035e-05`; as short as it is where that already says it."""
    return f"{short} = {value:.5g}" if "^" in short else short


def _short(value: float) -> str:
    """A number in at most 10 characters: exact up to 65504, powers of two as such, else five digits."""
    mantissa, exponent = math.frexp(value)
    if mantissa == 0.5 and not -4 < exponent < 17:
        return f"2^{exponent - 1}"
    return f"{value:g}" if value == int(value) and abs(value) < 1e6 else f"{value:.5g}"


def _with_code(code: int, fmt: Format) -> Text:
    value = Fraction(fmt.max)
    if fmt.block is not None:
        return Text.assemble(
            f"{_exactly(Fraction(fmt.element.max))} × scale  ", _bits(code, fmt), f"  {_hex(code, fmt)}"
        )
    return Text.assemble(f"{_exactly(value)}  ", _bits(code, fmt), f"  {_hex(code, fmt)}")


def _hex(code: int, fmt: Format) -> str:
    return f"0x{code:0{-(-fmt.bits // 4)}X}"


def _plural(bits: int) -> str:
    return f"{bits} bit" if bits == 1 else f"{bits} bits"
