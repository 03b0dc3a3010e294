"""What a training run costs in memory and time, and what the same run costs in FP32: measured, in a fresh process."""

from __future__ import annotations

import statistics
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import get_context
from typing import Any

import torch
from torch import Tensor

from fewbits.measure.memory import is_quantized, peak_resident_bytes, weight_bytes
from fewbits.train.loop import Loop
from fewbits.train.settings import Settings

STEPS = 3  # the first one allocates, and is not timed


@dataclass(frozen=True)
class TrainingCost:
    """What a run costs.

    Attributes:
        bytes_per_parameter: Weights, their low-precision copies, gradients and optimizer state, over all weights.
        peak_bytes: The most RAM that its process has held.
        step_seconds: Median of its steps without the first, or the first if there is but one.
    """

    bytes_per_parameter: float
    peak_bytes: int
    step_seconds: float


def training_cost(loop: Loop) -> TrainingCost:
    """The cost of a run that has taken a step in this process."""
    seconds = [report.seconds for report in loop.reports[-loop.steps_here :]]
    return TrainingCost(
        _bytes(loop) / _parameters(loop), peak_resident_bytes(), statistics.median(seconds[1:] or seconds)
    )


def fp32_cost(settings: Settings) -> TrainingCost | None:
    """The cost of the same run with nothing rounded, from a few steps; None if its process dies, as of memory."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        try:
            return pool.submit(_cost_of, settings.in_fp32()).result()
        except BrokenProcessPool:
            return None


def _cost_of(settings: Settings) -> TrainingCost:
    loop = Loop(settings)
    for _ in range(STEPS):
        loop.step()
    return training_cost(loop)


def _bytes(loop: Loop) -> int:
    state = loop.mp.state_dict()
    kept = [*_tensors(state["optimizer"]), *_tensors(state["masters"])]
    return weight_bytes(loop.model) + loop.copy_bytes + loop.gradient_bytes + sum(each.nbytes for each in kept)


def _parameters(loop: Loop) -> int:
    """How many weights the model has, quantized ones included."""
    quantized = sum(module.quantized_bits()[1] for module in loop.model.modules() if is_quantized(module))
    return quantized + sum(param.numel() for param in loop.model.parameters())


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    values = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
    return [tensor for each in values for tensor in _tensors(each)]
