"""Formats for the eye: all of them in a table, one with its bits drawn, and how dialects differ about it.

Every function returns a Rich renderable that fits 80 columns and reads the same without colour.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict
from fractions import Fraction
from typing import Any

from rich import box
from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from fewbits.formats import Format, Kind, Specials, exact, names
from fewbits.formats.dialects import DIALECTS
from fewbits.report.cells import FIELD_STYLES, bits, exactly, field_widths, hexadecimal, short


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
            *(fmt.name, _width(fmt), _fields(fmt), short(fmt.max), normal, subnormal, _epsilon(fmt), _gigabytes(fmt))
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


def dialects_table(name: str) -> RenderableType:
    """What each dialect makes of numbers beyond one format's range, and what else it does in its own way.

    Raises:
        FewbitsError: unknown format, or a block format, whose elements always saturate.
    """
    fmt = Format.named(name)
    beyond = Fraction(fmt.element.max) * 2
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    table.add_column("dialect", style="bold", no_wrap=True)
    for heading in (f"{short(float(beyond))}", "Inf"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("of", overflow="fold")
    for dialect in DIALECTS:
        made = [exact.decode(exact.encode(v, fmt, overflow=dialect.name), fmt.element) for v in (beyond, math.inf)]
        note = f"; {dialect.notes[fmt.name]}" if fmt.name in dialect.notes else ""
        shown = [short(float(value)) if math.isfinite(value) else f"{value:g}" for value in made]
        table.add_row(dialect.name, *shown, f"{dialect.what}{note} ({dialect.seen})")
    default = f"fewbits: {fmt.overflow_rule(None)}, unless overflow= names another rule or a dialect."
    return Group(Text.assemble((fmt.name, "bold"), " beyond its range, by dialect"), table, Text(default))


def formats_data(which: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """The rows of the formats and what is derived from them, as plain data for JSON.

    Args:
        which: names of the formats; None is the whole catalog.

    Raises:
        FewbitsError: unknown format.
    """
    derived = ("bits", "max", "min", "smallest_normal", "smallest_subnormal", "eps", "has_inf", "has_nan", "nan_code")
    rows = (Format.named(name) for name in which or names())
    return [
        asdict(fmt) | {key: getattr(fmt, key) for key in derived} | {"bits_per_value": float(fmt.bits_per_value)}
        for fmt in rows
    ]


def _drawing(fmt: Format) -> Text:
    """The bit layout with a label to each field."""
    sign, exponent, mantissa = field_widths(fmt)
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
        for (width, letter, label), style in zip(labels, FIELD_STYLES, strict=True)
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
        ("least", short(fmt.min)),
        ("smallest normal", _power(fmt.smallest_normal, normal)),
        ("smallest subnormal", _power(fmt.smallest_subnormal, subnormal)),
        ("epsilon", _power(fmt.eps, _epsilon(fmt))),
        ("Inf", _inf_codes(fmt)),
        ("NaN", _nan_codes(fmt)),
        ("-0", hexadecimal(fmt.sign_bit, fmt) if fmt.has_negative_zero else "none"),
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
    return "none" if code is None else f"{hexadecimal(code, fmt)}, {hexadecimal(code | fmt.sign_bit, fmt)}"


def _nan_codes(fmt: Format) -> str:
    if fmt.block is not None:
        return f"the whole block, by its scale: {_nan_codes(Format.named(fmt.block.scale))}"
    if not fmt.has_nan:
        return f"none; NaN becomes {hexadecimal(fmt.nan_code, fmt)}"
    if fmt.specials is not Specials.IEEE:
        codes = {fmt.nan_code} | ({fmt.nan_code | fmt.sign_bit} if fmt.signed else set())
        return ", ".join(hexadecimal(code, fmt) for code in sorted(codes))
    first = (fmt.inf_code or 0) + 1
    spans = (
        f"{hexadecimal(first | sign, fmt)}–{hexadecimal((fmt.sign_bit - 1) | sign, fmt)}" for sign in (0, fmt.sign_bit)
    )
    return f"{', '.join(spans)}; fewbits writes {hexadecimal(fmt.nan_code, fmt)}"


def _fields(fmt: Format) -> str:
    return "/".join(map(str, field_widths(fmt)))


def _width(fmt: Format) -> str:
    return str(fmt.bits)


def _gigabytes(fmt: Format) -> str:
    return f"{float(fmt.bits_per_value / 8):.4g}"


def _smallest(fmt: Format) -> tuple[str, str]:
    if fmt.kind is not Kind.FLOAT:
        return "–", short(fmt.smallest_subnormal)
    has_subnormals = fmt.has_subnormals and fmt.mantissa_bits > 0
    return short(fmt.smallest_normal), short(fmt.smallest_subnormal) if has_subnormals else "–"


def _epsilon(fmt: Format) -> str:
    return short(fmt.eps)


def _power(value: float, short: str) -> str:
    """`2^-14 = 6.1035e-05`; as short as it is where that already says it."""
    return f"{short} = {value:.5g}" if "^" in short else short


def _with_code(code: int, fmt: Format) -> Text:
    value = Fraction(fmt.max)
    if fmt.block is not None:
        return Text.assemble(
            f"{exactly(Fraction(fmt.element.max))} × scale  ", bits(code, fmt), f"  {hexadecimal(code, fmt)}"
        )
    return Text.assemble(f"{exactly(value)}  ", bits(code, fmt), f"  {hexadecimal(code, fmt)}")


def _plural(bits: int) -> str:
    return f"{bits} bit" if bits == 1 else f"{bits} bits"
