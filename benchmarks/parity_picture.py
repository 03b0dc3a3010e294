"""The picture of `train_parity.py`: held-out loss over steps, a line a recipe, the mean of its seeds."""

from __future__ import annotations

from pathlib import Path
from statistics import mean
from typing import Any

COLOURS = {
    "fp32": "#444444",
    "fp16": "#1f77b4",
    "bf16": "#2ca02c",
    "fp8": "#9467bd",
    "fp16 without loss scaling": "#d62728",
    "bf16 without masters": "#ff7f0e",
}


def draw(report: dict[str, Any], path: Path) -> None:
    """Write the picture as PNG or SVG.

    Args:
        report: What `train_parity.py --json` writes.
        path: The file; its ending says which.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    for axes, (task, one) in zip(figure.subplots(1, len(report["tasks"])), report["tasks"].items(), strict=True):
        for recipe, runs in one["recipes"].items():
            steps = [step for step, _ in runs["held_out"][0]]
            losses = [mean(run[at][1] for run in runs["held_out"]) for at in range(len(steps))]
            failure = "without" in recipe
            axes.plot(steps, losses, label=recipe, color=COLOURS.get(recipe), linestyle="--" if failure else "-")
        axes.set_title(f"{task}, {one['parameters'] / 1e6:.1f}M trained parameters")
        axes.set_xlabel("step")
        axes.set_ylabel("held-out loss, nats")
        axes.grid(alpha=0.3)
    figure.axes[0].legend()
    figure.savefig(path)
