"""Figures of single positions in a text: their mean's standard error, and the worst of them.

Shapes: W windows, T positions in a window, R rows (positions) of one chunk, V vocabulary.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

BLOCK = 64
"""Neighbouring positions that are taken together: a hard passage is hard for many tokens in a row."""
_LEAST_BLOCKS = 8  # a deviation of fewer is hardly an estimate: a short text is cut into smaller blocks
WORST = 10
"""How many of the worst positions are kept."""
CHOICES = 3
"""How many of the likeliest next tokens are kept of each."""


def standard_error(values: torch.Tensor) -> float:
    """Standard error of the mean of all values, with blocks of 64 neighbours in a window taken as independent.

    Positions that follow each other share their context, and their figures are alike: taken as independent, their mean
    looks surer than it is. Blocks may be of unequal length (the ratio estimator of cluster sampling).

    Args:
        values: float64 `[W, T]`.

    Returns:
        In the unit of the values; NaN if one is NaN, or if there is only one block.
    """
    windows, positions = values.shape
    in_a_window = min(positions, max(positions // BLOCK, -(-_LEAST_BLOCKS // windows)))
    departures = values - values.mean()
    sums = [part.sum().item() for window in departures for part in window.tensor_split(in_a_window)]
    count = len(sums)
    if count < 2:
        return math.nan
    return math.sqrt(sum(each * each for each in sums) * count / (count - 1)) / values.numel()


@dataclass(frozen=True)
class WorstPosition:
    """A position of great divergence: what the two models would say there, by token id."""

    window: int
    position: int
    kl: float
    reference: tuple[tuple[int, float], ...]
    """The likeliest next tokens and their probabilities."""
    candidate: tuple[tuple[int, float], ...]


class WorstPositions:
    """The positions of the greatest finite KL so far; memory does not grow with the text."""

    def __init__(self, keep: int = WORST) -> None:
        self._keep = keep
        self._found: list[WorstPosition] = []

    def see(self, window: int, first: int, kl: torch.Tensor, log_p: torch.Tensor, log_q: torch.Tensor) -> None:
        """Look at positions that follow each other.

        Args:
            window: their window.
            first: the position of the first row.
            kl: `[R]`, nats.
            log_p: the reference's log-probabilities `[R, V]`.
            log_q: the candidate's `[R, V]`.
        """
        least = self._found[-1].kl if len(self._found) == self._keep else -math.inf
        order = kl.masked_fill(~kl.isfinite(), -math.inf).topk(min(self._keep, len(kl)))
        for value, row in zip(order.values.tolist(), order.indices.tolist(), strict=True):
            if value > least:
                chosen = WorstPosition(window, first + row, value, _likeliest(log_p[row]), _likeliest(log_q[row]))
                self._found.append(chosen)
        self._found.sort(key=lambda each: -each.kl)
        del self._found[self._keep :]

    def found(self) -> tuple[WorstPosition, ...]:
        """The worst first."""
        return tuple(self._found)


def _likeliest(log_p: torch.Tensor) -> tuple[tuple[int, float], ...]:
    top = log_p.topk(min(CHOICES, len(log_p)))
    return tuple(zip(top.indices.tolist(), top.values.exp().tolist(), strict=True))
