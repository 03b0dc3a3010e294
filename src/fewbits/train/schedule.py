"""The learning rate over a run: up in a line, down along half a cosine."""

from __future__ import annotations

import math

WARM_UP = 100  # steps, or a tenth of the run if that is less


def learning_rate(peak: float, steps: int, applied: int) -> float:
    """The rate of the next step.

        peak ─┐      ╭──╮
              │    ╱     ╲
        0    ─┘  ╱         ╲__     the last step's is above 0

    Args:
        peak: The largest one.
        steps: Of the whole run.
        applied: Steps so far, without those skipped: a step that was skipped uses up none of the schedule.
    """
    warm_up = max(1, min(WARM_UP, steps // 10))
    if applied < warm_up:
        return peak * (applied + 1) / warm_up
    return peak * 0.5 * (1 + math.cos(math.pi * (applied - warm_up) / max(1, steps - warm_up)))
