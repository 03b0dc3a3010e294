"""Results as Rich renderables: plain data in, tables out that read in 80 columns and without colour."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rich.box import SIMPLE_HEAD
from rich.console import Group
from rich.table import Table
from rich.text import Text

from fewbits.report.grouping import ManifestLike, group_rows

if TYPE_CHECKING:  # these modules import torch, which has no place here at run time
    from fewbits.measure.machine import Machine
    from fewbits.tensors.cast_report import CastReport

_UNITS = ("KiB", "MiB", "GiB", "TiB", "PiB")


def human_bytes(count: int | None) -> str:
    """Bytes in three digits and a binary unit: `1023 B`, `93.8 MiB`, `2.15 GiB`; `-` for None."""
    if count is None:
        return "-"
    if abs(count) < 1024:
        return f"{count} B"
    power = 1
    while abs(count) >= 999.5 * 1024**power and power < len(_UNITS):  # 999.5 would round to four digits
        power += 1
    value = count / 1024**power
    decimals = 2 if abs(value) < 9.995 else 1 if abs(value) < 99.95 else 0
    return f"{value:.{decimals}f} {_UNITS[power - 1]}"


def manifest_table(rows: Iterable[ManifestLike]) -> Group:
    """What happens to every tensor of a model; equal layers share a line, as `model.layers.{0..29}.mlp.down_proj`."""
    rows = list(rows)
    table = plain_table()
    table.add_column("module", overflow="fold")
    table.add_column("tensors", justify="right", no_wrap=True)
    table.add_column("shape", justify="right", no_wrap=True)
    table.add_column("format", no_wrap=True)
    table.add_column("bytes", justify="right", no_wrap=True)
    for name, members in group_rows(rows):
        first = members[0]
        module = Text(name)
        if first.reason is not None:
            module.append(f"\n  kept: {first.reason}", style="dim")
        shape = "×".join(str(size) for size in first.shape)
        nbytes = sum(member.nbytes for member in members)
        table.add_row(module, str(len(members)), shape, first.format, human_bytes(nbytes))
    return Group(table, Text(_manifest_caption(rows), style="bold"))


def _manifest_caption(rows: Sequence[ManifestLike]) -> str:
    total = human_bytes(sum(row.nbytes for row in rows))
    by_format: dict[str, int] = {}
    for row in rows:
        by_format[row.format] = by_format.get(row.format, 0) + row.nbytes
    parts = ", ".join(f"{human_bytes(nbytes)} in {name}" for name, nbytes in by_format.items())
    return f"{len(rows)} tensors, {total}: {parts}" if rows else "no tensors"


@dataclass(frozen=True)
class _CastRow:
    """A cast tensor as a row that groups by its name alone."""

    cast: CastReport
    shape: tuple[int, ...] = ()
    format: str = ""
    nbytes: int = 0
    reason: str | None = None

    @property
    def module(self) -> str:
        return self.cast.tensor.removesuffix(".weight")


def cast_table(casts: Iterable[CastReport]) -> Group:
    """What a cast did: the tensors in which values overflowed, became subnormal or became zero, and totals.

    Equal layers share a line, which adds their counts and shows their largest errors.
    """
    casts = list(casts)
    table = plain_table()
    table.add_column("module", overflow="fold")
    for heading in ("values", "over-\nflowed", "sub-\nnormal", "to zero", "largest\nerror", "relative"):
        table.add_column(heading, justify="right", no_wrap=True)
    told = [_CastRow(cast) for cast in casts if cast.overflowed or cast.subnormal or cast.zeroed]
    for name, rows in group_rows(told):
        members = [row.cast for row in rows]
        counts = [sum(getattr(cast, field) for cast in members) for field in ("values", *_FATES)]
        errors = [max(getattr(cast, f"max_{kind}_error") for cast in members) for kind in ("abs", "rel")]
        cells = *(f"{count:,}" if count else "-" for count in counts), *(f"{error:.2g}" for error in errors)
        table.add_row(Text(name), *cells, style="bold red" if counts[1] else None)
    caption = Text(_cast_caption(casts), style="bold")
    return Group(table, caption) if told else Group(caption)


_FATES = {"overflowed": "overflowed", "subnormal": "became subnormal", "zeroed": "became zero"}


def _cast_caption(casts: Sequence[CastReport]) -> str:
    values = sum(cast.values for cast in casts)
    worst = max(casts, key=lambda cast: cast.max_abs_error, default=None)
    start = f"{len(casts)} tensors, {values:,} values: "
    if worst is None or not (worst.max_abs_error or any(cast.overflowed for cast in casts)):
        return f"{start}all kept exactly"
    fates = [(sum(getattr(cast, field) for cast in casts), what) for field, what in _FATES.items()]
    counted = ", ".join(f"{count:,} {what}" for count, what in fates if count) or "all in the normal range"
    relative = max(cast.max_rel_error for cast in casts)
    return f"{start}{counted}; largest error {worst.max_abs_error:.2g} ({worst.tensor}), relative {relative:.2g}"


def machine_table(machine: Machine) -> Table:
    """The machine and the versions, a line each."""
    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, found in machine.versions.items():
        table.add_row(name, found)
    table.add_row("system", machine.system)
    table.add_row("CPU", f"{machine.cpu}, {machine.cores} cores")
    table.add_row("threads", str(machine.threads))
    memory = f"{human_bytes(machine.memory_bytes)}, {human_bytes(machine.available_bytes)} available"
    table.add_row("memory", memory)
    for gpu in machine.gpus:
        table.add_row("GPU", f"{gpu.name}, {human_bytes(gpu.memory_bytes)}, compute capability {gpu.capability}")
    if not machine.gpus:
        table.add_row("GPU", "none that PyTorch can use")
    table.add_row("kernels", f"{machine.isa} ({machine.isa_reason})")
    return table


def plain_table() -> Table:
    """A table with a line under its headings and nothing else drawn."""
    return Table(box=SIMPLE_HEAD, show_edge=False, padding=(0, 0), header_style="bold")


def figure(value: float | None, form: str) -> str:
    """A number in a format, or `-` for None."""
    if value is None:
        return "-"
    return format(value, form) if math.isfinite(value) else str(value)  # nan and inf are figures too
