"""A comparison's JSON as its page takes it: rounded, labelled, without what JSON cannot say, and not too long.

losses   of token t, as they come
kls      of the prediction made at token t, which is of token t + 1: moved on by one, so that both are of token t
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any

from fewbits.report.terminal import human_bytes

_MOST_FIGURES = 300_000
"""Figures of single tokens in a page, of all models together: about 2 MB. Further windows are left out, and said."""
_FIGURES = ("disk_bytes", "memory_bytes", "peak_bytes", "bits_per_weight", "kl", "kl_stderr", "top1", "top1_stderr",
            "perplexity", "perplexity_stderr", "prefill_tps", "decode_tps")  # fmt: skip


_MOST_NAMES = 5  # in the first sentence
_CASTS = ("fp32", "bf16", "fp16")


def page_data(data: dict[str, Any]) -> dict[str, Any]:
    """What the page shows of a comparison; see comparison_page/data.js.

    Args:
        data: `Comparison.to_json()`, or what it was read back from. Any part may be None or missing.
    """
    rows = data.get("rows") or []
    labels = _labels(rows, data.get("reference"))
    tokens = _first_windows(data.get("tokens") or [], len(rows))
    reference = next((at for at, row in enumerate(rows) if at == 0 and not _number(row.get("kl"))), None)
    casts = [row.get("name") == data.get("reference") and row.get("precision") in _CASTS for row in rows]
    others = [at for at, cast in enumerate(casts) if not cast]
    return {
        "about": _about(data, labels),
        "reference": reference,
        "chosen": others[0] if others else max(len(rows) - 1, 0),
        "notes": [str(note) for note in data.get("notes") or []],
        "made": _made(data),
        "tokens": tokens,
        "windows": max(data.get("windows") or 0, len(tokens)),
        "rows": [_row(row, label, len(tokens)) for row, label in zip(rows, labels, strict=True)],
        "search": _search(data.get("search")),
    }


def row_label(name: str, precision: str, reference: str | None) -> str:
    """What a row is called: casts of the reference by precision, others by name, with the precision if it hides it."""
    if name == reference:
        return precision
    return name if precision in name else f"{name} ({precision})"


def _labels(rows: Sequence[dict[str, Any]], reference: str | None) -> list[str]:
    """Of the rows; those that are alike are numbered."""
    labels = [row_label(str(row.get("name")), str(row.get("precision") or ""), reference) for row in rows]
    unlike = []
    for at, label in enumerate(labels):
        before = labels[:at].count(label)
        unlike.append(f"{label} #{before + 1}" if before else label)
    return unlike


def _row(row: dict[str, Any], label: str, windows: int) -> dict[str, Any]:
    return {
        "label": label,
        "precision": row.get("precision") or "",
        **{name: _number(row.get(name), 7) for name in _FIGURES},
        "layers": [
            [each["module"], each.get("format") or "", _number(each.get("bits")), _number(each.get("sqnr_db"))]
            for each in row.get("layers") or []
        ],
        "losses": [_numbers(window) for window in (row.get("losses") or [])[:windows]],
        "kls": [[None, *_numbers(window[:-1])] for window in (row.get("kls") or [])[:windows]],
        "worst": [_worst(each) for each in row.get("worst") or []],
    }


def _worst(each: dict[str, Any]) -> dict[str, Any]:
    return {
        "window": each["window"],
        "token": each["position"] + 1,
        "kl": _number(each.get("kl")),
        "context": each.get("context") or "",
        "following": each.get("following") or "",
        **{
            name: [[token, _number(probability)] for token, probability in each.get(name) or []]
            for name in ("reference", "candidate")
        },
    }


def _search(search: dict[str, Any] | None) -> dict[str, Any] | None:
    if not search:
        return None
    target = str(search.get("target") or "")
    asked = re.match(r"max_kl (\d+(?:\.\d*)?(?:e[-+]?\d+)?)(?: and |$)", target)
    return {
        "target": target.replace("max_kl", "a KL of at most").replace("max_size", "a size of at most"),
        "max_kl": _number(float(asked[1])) if asked else None,
        "met": search.get("met"),
        "assignment": [
            {
                "module": each["module"],
                "precision": str(each["precision"]),
                "bits": _bits(str(each["precision"])),
                "kl_alone": _number(each.get("kl_alone")),
            }
            for each in search.get("assignment") or []
        ],
        "left_out": [f"Without {name}: {why}" for name, why in (search.get("left_out") or {}).items()],
        "tried": [
            {"bits": bits, "kl": kl}
            for each in search.get("tried") or []
            if (bits := _number(each.get("bits"))) is not None and (kl := _number(each.get("kl"))) is not None
        ],
    }


def _bits(precision: str) -> int | None:
    """Bits of a code, from the name of a precision: 4 of nf4, 16 of bf16."""
    found = re.search(r"\d+", precision)
    return int(found[0]) if found else None


def _first_windows(tokens: list[list[str]], rows: int) -> list[list[str]]:
    """As many windows as the page may hold, one at least."""
    most = _MOST_FIGURES // (2 * rows + 1)
    kept: list[list[str]] = []
    for window in tokens:
        if kept and sum(map(len, kept)) + len(window) > most:
            break
        kept.append(window)
    return kept


def _about(data: dict[str, Any], labels: Sequence[str]) -> str:
    size = data.get("reference_bytes")
    reference = f"{data.get('reference') or 'a model'}{f' ({human_bytes(size)} on disk)' if size else ''}"
    precision = f" in {labels[0]}" if labels and labels[0] in _CASTS else ""
    models = f"{_listed(labels[1:])} held against {reference}{precision}"
    text = f" on {data['text']}" if data.get("text") else ""
    windows = f", {data['windows']} × {data['window_tokens']} tokens" if data.get("windows") else ""
    speed = ""
    if data.get("prompt_tokens"):
        speed = (
            f" Speed: a prompt of {data['prompt_tokens']} tokens, then {data.get('new_tokens')} one at a time, "
            f"best of {data.get('speed_repeats')}."
        )
    return f"{models}{text}{windows}.{speed}"


def _listed(labels: Sequence[str]) -> str:
    if not 1 <= len(labels) <= _MOST_NAMES:
        return f"{len(labels)} models"
    return f"{', '.join(labels[:-1])} and {labels[-1]}" if len(labels) > 1 else labels[0]


def _made(data: dict[str, Any]) -> list[str]:
    """The machine, its software and the day, a line each."""
    machine = data.get("machine") or {}
    parts = [machine.get("cpu"), _counted(machine.get("threads"), "thread")]
    parts += [
        machine.get("isa"),
        f"{human_bytes(machine['memory_bytes'])} RAM" if machine.get("memory_bytes") else None,
    ]
    parts += [gpu.get("name") for gpu in machine.get("gpus") or []]
    versions = ", ".join(f"{name} {version}" for name, version in (machine.get("versions") or {}).items())
    lines = [", ".join(part for part in parts if part), machine.get("system"), versions]
    lines += [f"Measured {data['date']}." if data.get("date") else None]
    return [line for line in lines if line]


def _counted(count: int | None, what: str) -> str | None:
    return None if count is None else f"{count} {what}{'' if count == 1 else 's'}"


def _numbers(values: Sequence[float | None]) -> list[float | int | None]:
    return [_number(value) for value in values]


def _number(value: float | None, digits: int = 4) -> float | int | None:
    """A number of so many digits; None for what is none or not finite."""
    if value is None or not math.isfinite(value):
        return None
    if isinstance(value, int):
        return value
    return float(f"{value:.{digits}g}") if abs(value) >= 1e-9 else 0
