"""The precisions that a model can be given, as data: which formats its layers' weights and activations take."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fewbits.errors import FewbitsError
from fewbits.formats import Format
from fewbits.formats.precisions import STORED_PRECISIONS, StoredPrecision
from fewbits.kernels.rotation import block_of
from fewbits.tensors.quantized import has_power_scales


@dataclass(frozen=True)
class Precision:
    """A named choice of formats for a model.

    Attributes:
        name: As users write it, ``--to int8``.
        weights: Format of the weights of quantized layers.
        activations: Format that activations are quantized to before a quantized layer; None: they stay as they are.
        group_size: Input features that share a scale; None: all of an output channel.
        cast: Whether every tensor takes the format by a cast, with no scales.
        summary: What it is, for a listing.
        rotated: Whether layers rotate what they are given, and their weights with it (``kernels.rotation``).
        given_rotated: Whether what layers are given is rotated already, by the weights before them.
    """

    name: str
    weights: Format
    activations: Format | None
    group_size: int | None
    cast: bool
    summary: str
    rotated: bool = False
    given_rotated: bool = False

    @property
    def stored_activations(self) -> Format | None:
        """What a checkpoint says of activations; of int4 nothing: in what they are computed is the reader's choice."""
        return self.activations if self.activations == self.weights else None

    @property
    def of_head(self) -> Precision:
        """What an output head gets: int8, rotated where it is stored in int8 like the other layers."""
        return replace(PRECISIONS["int8"], rotated=self.rotated and self.name == "int8")

    @property
    def gains_by_rotation(self) -> bool:
        """Whether outliers in activations cost more than anything else: so it is with integers, not with floats."""
        return self.activations is not None and self.activations.name == "int8" and not self.given_rotated

    def stores_as(self, other: Precision) -> bool:
        """Whether weights are the same codes and scales in another precision."""
        mine, theirs = (
            replace(one, activations=None, name="", summary="", given_rotated=False) for one in (self, other)
        )
        return mine == theirs

    def rotation(self, K: int) -> int:
        """The block of features that a layer of K input features rotates; 0: none."""
        return block_of(K) if self.rotated else 0

    def weight_bytes(self, N: int, K: int, scale_bytes: int) -> int:
        """Bytes of the codes and scales of a weight ``[N, K]``; scales that are powers of two are stored in one."""
        scale_bytes = 1 if has_power_scales(self.weights.name) else scale_bytes
        return N * (K * self.weights.bits // 8 + self.scales_per_channel(K) * scale_bytes)

    def scales_per_channel(self, K: int) -> int:
        """How many scales an output channel of K input features has."""
        return 1 if self.group_size is None else K // self.group_size


def _precision(stored: StoredPrecision) -> Precision:
    formats = (Format.named(stored.weights), Format.named(stored.activations) if stored.activations else None)
    return Precision(stored.name, *formats, stored.group_size, stored.cast, stored.summary)


PRECISIONS = {stored.name: _precision(stored) for stored in STORED_PRECISIONS}

TORCH_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

_SMALLER_GROUPS = (64, 32)


def fit_groups(precision: Precision, widths: Iterable[int]) -> Precision:
    """The same precision with the largest group size, at most its own, that divides every one of these widths.

    Widths that 32 does not divide are left out: such layers cannot be quantized in groups at all.
    """
    if precision.group_size is None:
        return precision
    widths = [width for width in widths if width % _SMALLER_GROUPS[-1] == 0]
    sizes = [precision.group_size, *(size for size in _SMALLER_GROUPS if size < precision.group_size)]
    fits = next((size for size in sizes if all(width % size == 0 for width in widths)), sizes[-1])
    return replace(precision, group_size=fits)


def cast_weight(name: str, weight: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a weight in another dtype, rounded to nearest even; NaN and Inf stay what they are.

    Raises:
        FewbitsError: If a finite value is beyond the dtype's largest number.
    """
    refuse_overflow(name, weight, dtype)
    return weight.to(dtype)


def refuse_overflow(name: str, weight: Tensor, dtype: torch.dtype) -> None:
    """Refuse a weight that another dtype cannot hold. It is only looked at: rounding keeps the order of numbers.

    Raises:
        FewbitsError: If a finite value is beyond the dtype's largest number.
    """
    if weight.dtype == dtype or weight.dtype.itemsize == 1 or weight.numel() == 0:  # no 8-bit float is beyond
        return
    if all(extreme.to(dtype).isfinite() for extreme in weight.aminmax()):  # takes no memory
        return
    beyond = weight.to(dtype).isinf() & ~weight.isinf()
    if beyond.any():
        format_name = next(known for known, its in TORCH_DTYPES.items() if its == dtype)
        raise FewbitsError(
            f"{name}: {weight[beyond][0].item():.6g} is beyond {format_name}, whose largest number "
            f"is {torch.finfo(dtype).max:.6g}; use bf16 or fp32"
        )


def precision_named(name: str) -> Precision:
    """Return the precision of that name.

    Raises:
        FewbitsError: If there is none; the nearest name is suggested.
    """
    if name in PRECISIONS:
        return PRECISIONS[name]
    near = difflib.get_close_matches(name.lower(), PRECISIONS, n=1, cutoff=0.4)
    hint = f"did you mean {near[0]}? " if near else ""
    raise FewbitsError(f"precision {name!r} is unknown; {hint}known: {', '.join(PRECISIONS)}")
