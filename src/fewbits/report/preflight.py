"""A preflight for the terminal: the worst layers, the loss scales that work, what to keep, the verdict.

All of it is read from the plain data that ``--json`` writes.
"""

from __future__ import annotations

import math
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

_ROWS = 12


def preflight_table(data: dict[str, Any]) -> RenderableType:
    """The worst layers, one tensor a line, and below them what follows from all."""
    table = Table(box=SIMPLE_HEAD, show_edge=False, padding=(0, 0), header_style="bold")
    table.add_column("module", overflow="fold")
    table.add_column("of", no_wrap=True)
    table.add_column("format", no_wrap=True)
    for heading in ("to zero\n%", "subnor-\nmal %", "beyond\n%", "lost\n%"):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in worst_rows(data, _ROWS):
        cells = (f"{100 * row[name]:.2g}" for name in ("zeroed", "subnormal", "saturated", "lost"))
        style = "bold red" if badness(row, data) > 1 else None
        table.add_row(Text(row["name"]), row["kind"].replace("weight_", "w. "), row["format"], *cells, style=style)
    lines = [Text(caption(data), style="dim")]
    lines += [Text(line) for line in keep_lines(data)]
    return Group(table, *lines, Text(data["verdict"], style="bold"))


def worst_rows(data: dict[str, Any], most: int) -> list[dict[str, Any]]:
    """The rows that suffer most, worst first: by what is lost beside what their format's rounding may change."""
    return sorted(data["modules"], key=lambda row: (badness(row, data), row["zeroed"]), reverse=True)[:most]


def badness(row: dict[str, Any], data: dict[str, Any]) -> float:
    """Above 1 it is trouble: values beyond a 16-bit range, or more lost than the tolerance."""
    fmt = data["formats"][row["format"]]
    if row["saturated"] and fmt["bits"] > 8:
        return math.inf
    return float(row["lost"] / fmt["tolerance"])


def keep_lines(data: dict[str, Any]) -> list[str]:
    """What to keep in a wider format, a line each, with the reason."""
    lines = []
    for kept in data["keep"]:
        many = f" ({len(kept['modules'])} layers; the worst: " if len(kept["modules"]) > 1 else " ("
        what = f"keep {kept['pattern']}" if kept["pattern"] else f"cannot be kept: {kept['modules'][0]}"
        lines.append(f"{what}{many}{kept['reason']})")
    return lines


def caption(data: dict[str, Any]) -> str:
    """What was looked at, and the loss scales that work."""
    seen = f"{data['steps']} step{'s' if data['steps'] > 1 else ''} in fp32"
    if "text" in data:
        seen += f" on {data['text']}, {data['batch']} × {data['length']} tokens each"
    parts = [f"The worst of {len(data['modules'])} tensors; {seen}; mean loss {data['loss']:.4g}."]
    if window := data["loss_scale"]:
        low, high, best = (power(window[name]) for name in ("smallest", "largest", "recommended"))
        fit = f"{window['fitting']} of {window['layers']} matmuls"
        parts.append(f"Loss scales {low} to {high} fit {fit}; {best} is recommended, and gradients are shown at it.")
    parts.append("Lost: the error of all that is below the normal numbers, as a part of the sum of magnitudes.")
    return " ".join(parts)


def power(value: float) -> str:
    """A power of two."""
    return f"2^{round(math.log2(value))}"


def percent(share: float) -> str:
    """A share in per cent, three digits at most: `12.3 %`, `0 %`, `3e-06 %`."""
    return f"{100 * share:.3g} %"
