"""A comparison on a terminal: the models, one a row, then how sure the figures are, and where the worst is."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from typing import TYPE_CHECKING

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from fewbits.report.comparison_data import row_label
from fewbits.report.terminal import figure, human_bytes, plain_table

if TYPE_CHECKING:  # these modules import torch, which has no place here at run time
    from fewbits.measure.comparison import Choice, Comparison, Layer, Row, Worst

_CONTEXT = 40  # characters of text before a worst position
_SHOWN_CHOICES = 2


def comparison_table(comparison: Comparison) -> Group:
    """The models of a comparison, one a row, and under them what they were measured on."""
    parts: list[RenderableType] = [_models(comparison)]
    if any(math.isfinite(row.perplexity_stderr) or row.layers or row.peak_bytes for row in comparison.rows):
        parts += [Text(), _details(comparison)]
    worst = [_worst_line(row, row.worst[0], comparison) for row in comparison.rows if row.worst]
    if worst:
        parts += [Text(), Text("Where they differ most:", style="bold"), *worst, Text()]
    parts += [Text(f"Note: {note}", style="bold") for note in comparison.notes]
    return Group(*parts, Text(_caption(comparison), style="dim"))


def _label(row: Row, comparison: Comparison) -> str:
    return row_label(row.name, row.precision, comparison.reference)


def _models(comparison: Comparison) -> Table:
    unit, divisor = _unit(comparison)
    table = plain_table()
    table.add_column("model", overflow="fold")
    bytes_columns = (f"disk\n{unit}", f"memory\n{unit}", "bits/\nweight")
    quality_columns = (f"KL to {comparison.rows[0].precision}\nnats/token", "top-1\n%", "perpl.")
    for heading in (*bytes_columns, *quality_columns, "prefill\ntok/s", "decode\ntok/s"):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in comparison.rows:
        table.add_row(
            _label(row, comparison),
            figure(None if row.disk_bytes is None else row.disk_bytes / divisor, ",.1f"),
            figure(row.memory_bytes / divisor, ",.1f"),
            figure(row.bits_per_weight, ".2f"),
            _with_error(row.kl, row.kl_stderr, ".4f") if row.kl_stderr else figure(row.kl, ".4f"),
            figure(100 * row.top1, ".1f"),
            figure(row.perplexity, ".3f"),
            figure(row.prefill_tps, ",.0f"),
            figure(row.decode_tps, ",.1f"),
        )
    return table


def _details(comparison: Comparison) -> Table:
    """Errors of the figures, the memory that was measured, and the layer that lost most."""
    unit, divisor = _unit(comparison)
    table = plain_table()
    table.add_column("model", overflow="fold")
    for heading in ("top-1 %", "perplexity", f"running\n{unit}", "weakest\nlayer, dB"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column(" ", overflow="fold")
    for row in comparison.rows:
        weakest = _weakest(row.layers)
        table.add_row(
            _label(row, comparison),
            _with_error(100 * row.top1, 100 * row.top1_stderr, ".1f"),
            _with_error(row.perplexity, row.perplexity_stderr, ".3f"),
            figure(None if row.peak_bytes is None else row.peak_bytes / divisor, ",.1f"),
            figure(None if weakest is None else weakest.sqnr_db, ".1f"),
            " " if weakest is None else f" {weakest.module} ({weakest.format})",
        )
    return table


def _weakest(layers: Iterable[Layer]) -> Layer | None:
    measured = [layer for layer in layers if layer.sqnr_db is not None]
    return min(measured, key=lambda layer: layer.sqnr_db or 0.0, default=None)


def _worst_line(row: Row, worst: Worst, comparison: Comparison) -> Text:
    context = " ".join(worst.context.split())[-_CONTEXT:]
    label = _label(row, comparison)
    reference = _label(comparison.rows[0], comparison)
    followed = f", where {_quoted(worst.following)} follows" if worst.following else ""
    line = Text(f"{label}: KL {worst.kl:.2f} after {_quoted('…' + context)}{followed}: {reference} ")
    return line.append(f"{_said(worst.reference)}; {label} {_said(worst.candidate)}")


def _said(choices: Iterable[Choice]) -> str:
    return ", ".join(f"{_quoted(token)} {probability:.0%}" for token, probability in list(choices)[:_SHOWN_CHOICES])


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)  # a line break or an escape code would be obeyed by the terminal


def _unit(comparison: Comparison) -> tuple[str, int]:
    largest = max(max(row.memory_bytes, row.disk_bytes or 0) for row in comparison.rows)
    return ("GiB", 2**30) if largest >= 10 * 2**30 else ("MiB", 2**20)


def _with_error(value: float, error: float, form: str) -> str:
    return f"{figure(value, form)} ±{figure(error, '.1g')}"


def _caption(comparison: Comparison) -> str:
    size = "" if comparison.reference_bytes is None else f" ({human_bytes(comparison.reference_bytes)} on disk)"
    lines = [
        f"Reference: {comparison.reference}{size}.",
        f"Text: {comparison.text}, {comparison.windows} × {comparison.window_tokens} tokens.",
    ]
    if any(row.kl_stderr > 0 for row in comparison.rows):
        lines.append(
            "±: one standard error, by blocks of 64 tokens. dB: output of a layer, given the reference's input."
        )
    if comparison.prompt_tokens is not None:
        lines.append(
            f"Speed: a prompt of {comparison.prompt_tokens} tokens, then {comparison.new_tokens} one at a time; "
            f"best of {comparison.speed_repeats}."
        )
    machine = comparison.machine
    torch = machine.versions.get("torch", "unknown")
    lines.append(f"{machine.cpu}, {machine.threads} threads, {machine.isa}; torch {torch}; {comparison.date}.")
    return "\n".join(lines)
