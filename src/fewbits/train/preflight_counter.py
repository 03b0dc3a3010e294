"""Who counts, in a run of low precision, what ``preflight`` has predicted."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fewbits.formats import Format, exact
from fewbits.train.preflight_names import Key, ModuleNames, split_key
from fewbits.train.preflight_observers import noise_rows
from fewbits.train.scaling import scale_exponents


@dataclass
class Tally:
    """What was counted of one operand in a run of low precision.

    Attributes:
        values: How many values were read.
        zeros: How many of them were zero, or became so.
        zeroed: How many of them the last cast made zero. To 8 bits there is one cast; a 16-bit operand may have got its
            zeros before, when it was the result of another operation.
        subnormal: How many were subnormal numbers of the format.
        saturated: How many were Inf, or beyond the format's range before they were rounded.
        nan: How many were NaN.
        scales: How often each scale 2^k was given to a whole 8-bit tensor, by k.
    """

    values: int = 0
    zeros: int = 0
    zeroed: int = 0
    subnormal: int = 0
    saturated: int = 0
    nan: int = 0
    scales: Counter[int] = field(default_factory=Counter)


class OperandCounter(ModuleNames):
    """Counts zeros, subnormal and saturated values as the matmuls of a real run read them.

    counter = OperandCounter()
    mp.policy.observe(counter)
    with counter.watching(model):
        …  # train
    counter.tallies["layers.0.up", "gradient"].zeros
    """

    def __init__(self) -> None:
        super().__init__()
        self.tallies: dict[Key, Tally] = {}

    def operand(self, key: str, before: Tensor, after: Tensor, fmt: Format, amax: Tensor | None, square: bool) -> None:
        """Count an operand."""
        tally = self.tallies.setdefault(split_key(key), Tally())
        exponents = None if amax is None else scale_exponents(after, fmt, amax, square)
        magnitude = _up(after, exponents).abs()
        tally.values += magnitude.numel()
        zero = magnitude == 0
        tally.zeros += int(zero.sum())
        says = _says_something(before, key, scaled=exponents is not None)
        tally.zeroed += int((zero & (before != 0) & says).sum())
        tally.subnormal += int(((magnitude > 0) & (magnitude < fmt.smallest_normal) & says).sum())
        tally.nan += int(magnitude.isnan().sum())
        if exponents is None:
            tally.saturated += int(magnitude.isinf().sum())
        else:
            beyond = float(fmt.max + exact.ulp(fmt.max, fmt) / 2)
            if exponents.ndim == 0 and bool(exponents.isfinite()):
                tally.scales[int(exponents)] += 1
            tally.saturated += int((_up(before, exponents).abs() > beyond).sum())


def _says_something(x: Tensor, key: str, scaled: bool) -> Tensor:
    """Where values are no rounding noise of a gradient: bool, broadcasts to ``x``; looked at in 8-bit operands."""
    noise = noise_rows(x, key) if scaled else None
    return torch.tensor(True, device=x.device) if noise is None else ~noise[:, None]


def _up(x: Tensor, exponents: Tensor | None) -> Tensor:
    wide = x.detach().float()
    return wide if exponents is None else wide * torch.exp2(exponents)
