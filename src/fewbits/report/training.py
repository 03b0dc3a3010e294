"""What a training run shows: a line under way, and two at its end."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from fewbits.report.terminal import human_bytes

if TYPE_CHECKING:  # these modules import torch, which has no place here at run time
    from fewbits.measure.training import TrainingCost
    from fewbits.train.loop import StepReport

LAST = 10  # steps that the loss of an end is a mean of, if the run has twice as many


def progress_line(reports: Sequence[StepReport]) -> str:
    """The state of a run: ``loss 2.913  scale 2^16  skipped 0  1,204 tokens/s``."""
    now = reports[-1]
    recent = reports[-LAST:]
    speed = sum(report.tokens for report in recent) / sum(report.seconds for report in recent)
    skipped = sum(report.skipped for report in reports)
    scale = f"scale 2^{math.log2(now.loss_scale):.0f}"
    return f"loss {now.loss:.3f}  {scale}  skipped {skipped}  {speed:,.0f} tokens/s"


def summary_line(reports: Sequence[StepReport], precision: str) -> str:
    """What a run has done to the loss."""
    taken = [report for report in reports if not report.skipped]
    skipped = len(reports) - len(taken)
    words = f"{len(reports)} steps in {precision}, {skipped} skipped"
    if not taken:
        return words
    some = max(1, min(LAST, len(taken) // 2))
    first, last = taken[:some], taken[-some:]
    count = f"{some} steps" if some > 1 else "step"
    return f"{words}; loss {_mean(first):.3f} → {_mean(last):.3f} nats/token, in the first and last {count}"


def cost_line(precision: str, cost: TrainingCost, fp32: TrainingCost | None) -> str:
    """Memory and time, beside those of the same run in FP32 where they were measured."""
    if fp32 is None:
        return (
            f"{precision}: {cost.bytes_per_parameter:.1f} bytes per parameter, peak memory "
            f"{human_bytes(cost.peak_bytes)}, {cost.step_seconds:.3g} s per step"
        )
    return (
        f"{precision} and fp32, both measured: {cost.bytes_per_parameter:.1f} and {fp32.bytes_per_parameter:.1f} bytes "
        f"per parameter, peak memory {human_bytes(cost.peak_bytes)} and {human_bytes(fp32.peak_bytes)}, "
        f"{cost.step_seconds:.3g} and {fp32.step_seconds:.3g} s per step"
    )


def training_data(
    settings: dict[str, Any], reports: Sequence[StepReport], cost: TrainingCost, fp32: TrainingCost | None
) -> dict[str, Any]:
    """All of it as JSON takes it; what is not finite is None."""
    steps = [{name: _finite(value) for name, value in vars(report).items()} for report in reports]
    return {
        "settings": settings,
        "steps": steps,
        "skipped": sum(report.skipped for report in reports),
        "cost": vars(cost),
        "fp32": None if fp32 is None else vars(fp32),
    }


def _mean(reports: Sequence[StepReport]) -> float:
    return sum(report.loss for report in reports) / len(reports)


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
