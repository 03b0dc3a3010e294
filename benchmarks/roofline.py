"""The roofline picture: what each library reaches against what the machine allows.

    python benchmarks/roofline.py RESULT.json … --out docs/speed.svg

The results are those that `bench_generate.py` writes with `--json`; one panel a model, those of one model are joined.
Needs matplotlib (`pip install fewbits[plot]`).
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("svg")
from limits import BITS
from matplotlib import pyplot as plt

COLOURS = {
    "fewbits": "#c8102e",
    "llama.cpp": "#1f5fa8",
    "CTranslate2": "#2a8a3c",
    "torchao": "#b8860b",
    "bitsandbytes": "#7a4fa0",
    "transformers": "#666666",
}
MARKS = {4: "v", 8: "o", 16: "s"}


def main() -> None:
    """Parse, join, draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, nargs="+")
    parser.add_argument("--out", type=Path, default=Path("docs/speed.svg"))
    options = parser.parse_args()
    models = joined([json.loads(file.read_text()) for file in options.results])
    mpl.rcParams.update({"svg.hashsalt": "fewbits", "font.size": 9})
    picture, panels = plt.subplots(
        1, len(models), figsize=(4.6 * len(models), 4.6), sharey=True, squeeze=False, layout="constrained"
    )
    for panel, report in zip(panels[0], models, strict=True):
        draw(panel, report)
    panels[0][0].set_ylabel("operations reached, GOP/s")
    handles, labels = panels[0][0].get_legend_handles_labels()
    picture.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False)
    picture.savefig(options.out, metadata={"Date": None})


def joined(reports: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One report a model: the first figures of each library, the best limits."""
    models: dict[str, dict[str, Any]] = {}
    for report in reports:
        one = models.setdefault(report["model"], report)
        one["figures"] = report["figures"] | one["figures"]
        for key, value in report["limits"].items():
            one["limits"][key] = max(value, one["limits"].get(key, 0.0))
    return list(models.values())


def draw(panel: Any, report: dict[str, Any]) -> None:
    """One model: the roof, and two points a library, decode on the left and prefill on the right."""
    read, multiply = report["limits"]["read_bytes_per_s"] / 1e9, report["limits"]["int8_ops_per_s"] / 1e9
    ridge = multiply / read
    panel.plot([0.5, ridge, 4096], [0.5 * read, multiply, multiply], color="black", linewidth=1.2)
    panel.text(0.6, 0.6 * read * 1.3, f"{read:.0f} GB/s", rotation=38, fontsize=8)
    panel.text(ridge * 1.4, multiply * 1.1, f"{multiply:.0f} GOP/s in int8", fontsize=8)
    for name, one in report["figures"].items():
        if name not in BITS:  # a variant of another point
            continue
        a_byte = 2 / (BITS[name] / 8)  # operations for each byte of weights, with one token
        a_token = 2 * report["weights"] / 1e9
        panel.plot(
            [a_byte, a_byte * report["prompt"]], [one["decode"] * a_token, one["prefill"] * a_token],
            linestyle="none", marker=MARKS[min(MARKS, key=lambda bits: abs(bits - BITS[name]))], markersize=6,
            color=COLOURS[name.split()[0]], markerfacecolor="none" if BITS[name] < 5 else None,
            label=name,
        )  # fmt: skip
    panel.set(xscale="log", yscale="log", title=report["model"], xlabel="operations for each byte of weights read")
    panel.set_ylim(1, 2000)
    panel.grid(which="major", alpha=0.25)


if __name__ == "__main__":
    main()
