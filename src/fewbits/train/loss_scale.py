"""The loss scale: a power of two that the gradients themselves say.

Gradients below the smallest number of their format vanish, so the loss is multiplied by a scale and the gradients are
divided by it. Each step one pass over the gradients tells the largest magnitude and how many are Inf or NaN.

    1  all finite: after `patience` such steps the scale grows toward the largest power of two that leaves `headroom`
       above the largest gradient of those steps: by 2, the next time by 4, then 16, 256, …
    2  an Inf: the scale was too large. The step is skipped; the scale is divided by 2, the next time in a row by 4,
       then by 8, …. If it had just grown, the scale that overflowed is not tried again for `memory` clean steps:
       gradients inside the model may be larger than any that the step sees
    3  NaN but no Inf: not the scale's doing, most likely. The step is skipped and the scale stays; if the steps that
       follow have NaN too, an overflow may be hiding behind them, and they count as rule 2

So a run of bad batches that takes the scale from 2^16 to 1 is forgotten after some fifty clean steps.
A scale is never below the floor, so its inverse is finite and no gradient is multiplied by 0 or Inf.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from fewbits.train.recipe import LossScaling

_NO_CEILING = math.inf
_LONGEST_LEAP = 64  # exponents: beyond any range of scales


@dataclass
class LossScale:
    """The scale and what moves it.

    Attributes:
        rules: How it moves; None: it is 1 and stays.
        largest: The largest finite number of the gradients' format.
        scale: The scale now.
        clean: Steps without Inf or NaN since the scale was last looked at.
        overflows: Skipped steps in a row.
        grew: Whether the scale has just grown, so that the growth is to blame for an overflow.
        leap: The exponent of the next growth.
        ceiling: The scale stays at or below this: it overflowed above.
        since_ceiling: Clean steps since the ceiling was set.
        amax: The largest unscaled gradient of the clean steps counted.
    """

    rules: LossScaling | None
    largest: float
    scale: float = field(init=False)
    clean: int = field(init=False, default=0)
    overflows: int = field(init=False, default=0)
    grew: bool = field(init=False, default=False)
    leap: int = field(init=False, default=1)
    ceiling: float = field(init=False, default=_NO_CEILING)
    since_ceiling: int = field(init=False, default=0)
    amax: float = field(init=False, default=0.0)

    def __post_init__(self) -> None:
        self.scale = self.rules.initial if self.rules else 1.0

    def update(self, amax: float, infinite: bool, nan: bool) -> None:
        """Learn from one step.

        Args:
            amax: The largest finite magnitude among the gradients, scaled as they are.
            infinite: Whether any of them is ±Inf.
            nan: Whether any of them is NaN.
        """
        if self.rules is None or not self.rules.dynamic:
            return
        if infinite or nan:
            self._skipped(infinite)
        else:
            self._clean(amax / self.scale)

    def _skipped(self, infinite: bool) -> None:
        assert self.rules
        if not infinite and self.overflows == 0:
            self.overflows, self.clean, self.amax = 1, 0, 0.0
            return
        self.overflows += 1
        if self.overflows >= self.rules.hysteresis:
            if self.grew:
                self.ceiling, self.since_ceiling = max(self.scale / 2, self.rules.floor), 0
            backoff = 2.0 ** min(1 + self.overflows - self.rules.hysteresis, 100)
            self.scale = max(self.scale / backoff, self.rules.floor)
        self.clean, self.amax, self.leap = 0, 0.0, 1

    def _clean(self, amax: float) -> None:
        assert self.rules
        if self.overflows:
            self.overflows, self.grew = 0, False
        self.clean += 1
        self.since_ceiling += 1
        self.amax = max(self.amax, amax)
        if self.since_ceiling >= self.rules.memory:
            self.ceiling, self.since_ceiling = _NO_CEILING, 0
        if self.clean >= self.rules.patience:
            target = self.solved()
            self.grew = target > self.scale
            self.scale = min(target, self.scale * 2.0**self.leap)
            self.leap = min(2 * self.leap, _LONGEST_LEAP) if self.grew else 1
            self.clean, self.amax = 0, 0.0

    def solved(self) -> float:
        """The largest power of two with headroom above the largest gradient seen, within floor, cap and ceiling."""
        assert self.rules
        highest = min(self.rules.cap, self.ceiling)
        if self.amax > 0:
            highest = min(highest, _power_of_two_below(self.largest / self.rules.headroom / self.amax))
        return max(highest, self.rules.floor)

    def state_dict(self) -> dict[str, Any]:
        """All that moves."""
        return {name: getattr(self, name) for name in _MOVES}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up where ``state_dict`` was made."""
        for name in _MOVES:
            setattr(self, name, state[name])


_MOVES = ("scale", "clean", "overflows", "grew", "leap", "ceiling", "since_ceiling", "amax")


def _power_of_two_below(value: float) -> float:
    """The largest power of two at most this; clipped to what any scale can be."""
    value = min(max(value, 2.0**-100), 2.0**100)
    return math.ldexp(1.0, math.frexp(value)[1] - 1)
