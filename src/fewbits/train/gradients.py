"""What one pass over the gradients tells: Inf and NaN by tensor, the largest magnitude, the norm."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fewbits.kernels import adamw as kernels
from fewbits.train.storage import STATE_CODES

_CHUNK, _LANES = 4096, 16  # the order of the sum of squares: that of gradient_stats in csrc/adamw.hpp


@dataclass(frozen=True)
class Culprit:
    """A tensor that is not finite.

    Attributes:
        name: Of the parameter whose gradient it is, or ``loss``.
        infinite: How many elements are ±Inf; on all processes together where the parameter is sharded.
        nan: How many are NaN.
    """

    name: str
    infinite: int
    nan: int


@dataclass(frozen=True)
class Reading:
    """The gradients of a step, scaled as they are.

    Attributes:
        culprits: Those that are not finite.
        amax: The largest finite magnitude.
        norm: The root of the sum of squares, summed in float64.
    """

    culprits: tuple[Culprit, ...]
    amax: float
    norm: float

    @property
    def infinite(self) -> bool:
        """Whether there is an Inf."""
        return any(culprit.infinite for culprit in self.culprits)

    @property
    def nan(self) -> bool:
        """Whether there is a NaN."""
        return any(culprit.nan for culprit in self.culprits)


@torch.no_grad()
def read(gradients: dict[str, Tensor]) -> Reading:
    """Read all gradients once; float32, bfloat16 or float16."""
    return reading_of(list(gradients), gradient_stats(list(gradients.values())))


@torch.no_grad()
def gradient_stats(tensors: list[Tensor]) -> Tensor:
    """Inf, NaN, largest finite magnitude and sum of squares of each: float64 ``[len(tensors), 4]``."""
    stats = kernels.gradient_stats(tensors, STATE_CODES)
    return torch.stack([gradient_stats_plain(tensor) for tensor in tensors]) if stats is None else stats


def reading_of(names: list[str], stats: Tensor) -> Reading:
    """What the statistics of named gradients say."""
    rows = stats.tolist()
    culprits = tuple(
        Culprit(name, int(row[0]), int(row[1])) for name, row in zip(names, rows, strict=True) if row[0] or row[1]
    )
    squares = 0.0
    for row in rows:  # in order: the norm is the same on every machine
        squares += row[3]
    return Reading(culprits, max(row[2] for row in rows), math.sqrt(squares) if squares >= 0 else math.nan)


def gradient_stats_plain(gradient: Tensor) -> Tensor:
    """Inf, NaN, largest finite magnitude, sum of squares: float64 ``[4]``; the meaning of the kernel.

    Squares are added by chunks of 4096: element i to lane i mod 16, then half of the lanes to the other half until one
    is left, then chunk to chunk. On other devices than the CPU they are added in any order.
    """
    x = gradient.reshape(-1).float()
    magnitude = x.abs()
    counts = torch.stack([x.isinf().sum(), x.isnan().sum()]).double()
    finite = torch.where(magnitude.isfinite(), magnitude, 0.0)
    amax = (finite.amax() if x.numel() else x.new_zeros(())).double()
    return torch.cat([counts, torch.stack([amax, _sum_of_squares(x)])])


def _sum_of_squares(x: Tensor) -> Tensor:
    squares = x.double().square()
    if x.device.type != "cpu":
        return squares.sum()
    lanes = torch.nn.functional.pad(squares, (0, -x.numel() % _CHUNK)).view(-1, _CHUNK // _LANES, _LANES)
    sums = lanes.cumsum(1)[:, -1]  # cumsum adds one after the other, where sum would choose an order
    while sums.shape[1] > 1:
        half = sums.shape[1] // 2
        sums = sums[:, :half] + sums[:, half:]
    return sums[:, 0].cumsum(0)[-1] if len(sums) else squares.new_zeros(())


_SLICE = 1 << 18  # elements that are widened at a time: they stay in the cache


@contextmanager
def added_up(parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """A backward pass in this context adds to the gradients that are there, in float32.

    PyTorch's engine adds 16 bits to 32 at a fifth of the speed; so it finds no gradient where it would have to.
    """
    sums: list[tuple[nn.Parameter, Tensor]] = []
    for param in parameters:
        if param.grad is not None and param.grad.dtype in (torch.float16, torch.bfloat16):
            param.grad = param.grad.float()
        if param.grad is not None and param.grad_dtype is None and param.device.type == "cpu":
            sums.append((param, param.grad))
            param.grad = None
    try:
        yield
    finally:
        for param, total in sums:
            if param.grad is not None:
                add_wide(total, param.grad)
            param.grad = total


@torch.no_grad()
def add_wide(total: Tensor, more: Tensor) -> None:
    """``total += more`` in float32, widened slice by slice."""
    if more.dtype == torch.float32 or not (total.is_contiguous() and more.is_contiguous()):
        total.add_(more)
        return
    for start in range(0, total.numel(), _SLICE):
        total.view(-1)[start : start + _SLICE].add_(more.view(-1)[start : start + _SLICE].float())
