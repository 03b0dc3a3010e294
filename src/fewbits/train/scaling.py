"""8-bit operands of matmuls: values of the format times power-of-two scales, held in bfloat16 without loss.

    x [R, C]  ->  round(x · 2^k) · 2^-k      k: one for the tensor, a row, or a block, from its largest magnitude

A value of 8 bits has at most 4 significant bits and bfloat16 has 8, with the exponents of float32: the product with
the scale is exact. So one matmul of such operands with float32 sums is what 8-bit hardware computes, block scales
included, up to the order of the sums.

Letters: R rows; C columns, the features that the matmul adds up.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from fewbits.formats import Format
from fewbits.tensors.cast import round_to

BLOCK = 128


def amax_of(x: Tensor, scaling: str, square: bool) -> Tensor:
    """The largest magnitudes that scales come from.

    Args:
        x: ``[R, C]``.
        scaling: ``tensor``, ``row`` or ``block``.
        square: Whether blocks are 128×128 instead of 1×128.

    Returns:
        float32; ``[]`` of the tensor, ``[R, 1]`` of rows, ``[R or ceil(R/128), ceil(C/128)]`` of blocks. NaN and Inf
        stay what they are.
    """
    if scaling == "tensor":
        low, high = torch.aminmax(x)
        return torch.maximum(-low, high).float()
    if scaling == "row":
        return x.abs().amax(-1, keepdim=True).float()
    R, C = x.shape
    padded = torch.nn.functional.pad(x.abs(), (0, -C % BLOCK, 0, -R % BLOCK if square else 0))
    rows, height = (padded.shape[0] // BLOCK, BLOCK) if square else (R, 1)
    return padded.view(rows, height, -1, BLOCK).amax((1, 3)).float()


def scaled_round(x: Tensor, fmt: Format, amax: Tensor, square: bool) -> Tensor:
    """Round to an 8-bit format with scales from ``amax``; the largest magnitudes just fit.

    Args:
        x: ``[R, C]``, float32 or bfloat16.
        fmt: A format of 8 bits.
        amax: As ``amax_of`` returns it; values beyond it saturate. Where it is NaN or Inf the result is NaN: an
            overflow is seen, never saturated away.
        square: As for ``amax_of``.

    Returns:
        bfloat16 ``[R, C]``.
    """
    exponents = scale_exponents(x, fmt, amax, square)
    up = torch.exp2(exponents)
    scaled = (x * up).bfloat16() if x.dtype == torch.bfloat16 else x * up
    rounded = round_to(scaled, fmt, overflow="saturate").bfloat16()
    return rounded * torch.exp2(-exponents).bfloat16()


def scale_exponents(x: Tensor, fmt: Format, amax: Tensor, square: bool) -> Tensor:
    """The k of each element's scale 2^k, as ``scaled_round`` takes it: float32, broadcasts to ``x``."""
    exponents = exponents_of(amax, fmt)
    if amax.ndim == 2 and amax.shape[1] > 1:
        exponents = exponents.repeat_interleave(BLOCK, 1)[:, : x.shape[1]]
    if square and amax.ndim == 2 and amax.shape[0] != x.shape[0]:
        exponents = exponents.repeat_interleave(BLOCK, 0)[: x.shape[0]]
    return exponents


def exponents_of(amax: Tensor, fmt: Format) -> Tensor:
    """The largest k with amax · 2^k at most the format's largest number, float32; NaN where amax is not finite."""
    room = float(fmt.max) / amax
    exponents = (torch.frexp(room)[1] - 1).float().clamp(-120, 120)
    exponents = torch.where(amax > 0, exponents, 0.0)
    return torch.where(amax.isfinite(), exponents, torch.nan)


class AmaxHistory:
    """Of each operand the largest magnitudes of the last steps: delayed scaling takes its scale from them."""

    def __init__(self, length: int) -> None:
        self.length = length
        self._seen: dict[str, Tensor] = {}  # [length], newest first
        self._now: dict[str, Tensor] = {}

    def scale_amax(self, key: str, amax: Tensor) -> Tensor:
        """Note the amax of an operand now, and return the one its scale comes from: the past's, or now's at first."""
        now = self._now.get(key)
        self._now[key] = amax if now is None else torch.maximum(now, amax)
        past = self._seen.get(key)
        # A non-finite operand must not be hidden by a scale of the past.
        return amax if past is None else torch.where(amax.isfinite(), past.max(), amax)

    def end_step(self, keep: bool, largest: Callable[[dict[str, Tensor]], dict[str, Tensor]] | None = None) -> None:
        """Move what was noted into the history; a step that is skipped leaves no trace.

        Args:
            keep: Whether the step was not skipped.
            largest: Gives the largest values of all processes, where there are several.
        """
        if keep and largest is not None:
            self._now = largest(self._now)
        for key, amax in self._now.items() if keep else ():
            past = self._seen.get(key, amax.new_zeros(self.length))
            self._seen[key] = torch.cat([amax.reshape(1), past[:-1]])
        self._now.clear()

    @contextmanager
    def untouched(self) -> Iterator[None]:
        """What is noted in this context is forgotten."""
        now = dict(self._now)
        try:
            yield
        finally:
            self._now = now

    def state_dict(self) -> dict[str, Tensor]:
        """The history of each operand."""
        return dict(self._seen)

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take up where ``state_dict`` was made."""
        self._seen = {key: value.clone() for key, value in state.items()}
        self._now.clear()


def scale_amax(x: Tensor, scaling: str | None, history: AmaxHistory, key: str, square: bool) -> Tensor:
    """The largest magnitudes that an operand's scales come from by a recipe's ``scaling``; None is ``tensor``."""
    if scaling == "delayed":
        return history.scale_amax(key, amax_of(x, "tensor", square))
    return amax_of(x, scaling or "tensor", square)
