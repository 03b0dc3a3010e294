"""Heat maps of exponents, as data: which share of a layer's values has which binary exponent, and what becomes of it.

columns: exponents e, 2^e ≤ magnitude < 2^(e+1), after the recipe's scaling         rows: modules
zero | subnormal | normal | overflow        the zones of the format, by column
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from typing import Any

KINDS = {"weight": "weights", "activation": "activations", "gradient": "gradients"}
ZONES = ("zero", "subnormal", "normal", "overflow")
_MARGIN = 12  # columns below the smallest number: what is smaller still is in the first of them


@dataclass(frozen=True)
class Panel:
    """One map.

    Attributes:
        title: weights, activations or gradients.
        format: The format whose zones it shows.
        exponents: Of the columns, ascending. The first column also has all smaller ones, the last all larger.
        zones: Of the columns; see ``ZONES``.
        shares: Of each module the share of its values in each column, 0 to 1; None where it has no such tensor in
            this format: what stays in a wider one has other zones.
    """

    title: str
    format: str
    exponents: tuple[int, ...]
    zones: tuple[str, ...]
    shares: tuple[tuple[float, ...] | None, ...]


def module_names(data: dict[str, Any]) -> list[str]:
    """The modules of a preflight's JSON, in order, each once."""
    return list(dict.fromkeys(row["name"] for row in data["modules"] if row["kind"] in KINDS))


def panels(data: dict[str, Any]) -> list[Panel]:
    """The maps of weights, activations and gradients of a preflight's JSON; none of a kind that it has not."""
    names = module_names(data)
    found = []
    for kind, title in KINDS.items():
        rows = {row["name"]: row for row in data["modules"] if row["kind"] == kind}
        if not rows:
            continue
        name = Counter(row["format"] for row in rows.values()).most_common(1)[0][0]
        fmt = data["formats"][name]
        rows = {module: row for module, row in rows.items() if row["format"] == name}
        exponents = _columns(rows, fmt)
        shares = tuple(_shares(rows[module], exponents) if module in rows else None for module in names)
        found.append(Panel(title, name, exponents, tuple(zone_of(e, fmt) for e in exponents), shares))
    return found


def zone_of(exponent: int, fmt: dict[str, Any]) -> str:
    """What a format makes of most values with this exponent."""
    if exponent < math.log2(fmt["zero_to"]):
        return "zero"
    if exponent < math.log2(fmt["smallest_normal"]):
        return "subnormal"
    return "normal" if exponent <= math.floor(math.log2(fmt["over_from"])) else "overflow"


def intensity(share: float) -> float:
    """How strong a cell is, 0 to 1: by the logarithm of its share, from one in ten million to all."""
    return 0.0 if share <= 0 else min(1.0, max(0.08, 1 + math.log10(share) / 7))


def _columns(rows: dict[str, dict[str, Any]], fmt: dict[str, Any]) -> tuple[int, ...]:
    seen = [int(e) for row in rows.values() for e in row["seen"]] or [0]
    smallest, largest = math.floor(math.log2(fmt["smallest_subnormal"])), math.floor(math.log2(fmt["over_from"]))
    first = max(min(seen), smallest - _MARGIN)
    last = min(max(max(seen), first), largest + _MARGIN)
    if fmt["bits"] < 16 or fmt["smallest_normal"] > 2.0**-30:  # narrow enough for all its zones to be shown
        first, last = min(first, smallest - 2), max(last, largest + 1)
    return tuple(range(first, last + 1))


def _shares(row: dict[str, Any], exponents: tuple[int, ...]) -> tuple[float, ...]:
    counts = [0] * len(exponents)
    for e, count in row["seen"].items():
        place = min(max(int(e), exponents[0]), exponents[-1]) - exponents[0]
        counts[place] += count
    total = sum(counts) or 1
    return tuple(count / total for count in counts)
