"""The precisions that a model can be given, as data: which formats its layers' weights and activations take."""

from __future__ import annotations

import difflib
from dataclasses import dataclass

import torch
from torch import Tensor

from fewbits.errors import FewbitsError
from fewbits.formats import Format


@dataclass(frozen=True)
class Precision:
    """A named choice of formats for a model.

    Attributes:
        name: As users write it, ``--to int8``.
        weights: Format of the weights of quantized layers.
        activations: Format that activations are quantized to before a quantized layer; None: they stay as they are.
        cast: Whether every tensor takes the format by a cast, with no scales.
        summary: What it is, for a listing.
    """

    name: str
    weights: Format
    activations: Format | None
    cast: bool
    summary: str


def _precision(name: str, weights: str, activations: str | None, cast: bool, summary: str) -> Precision:
    return Precision(name, Format.named(weights), Format.named(activations) if activations else None, cast, summary)


PRECISIONS = {
    precision.name: precision
    for precision in (
        _precision("fp32", "fp32", None, True, "every tensor in 32 bits"),
        _precision("bf16", "bf16", None, True, "every tensor in bfloat16"),
        _precision("fp16", "fp16", None, True, "every tensor in half precision"),
        _precision("int8", "int8", "int8", False, "8-bit weights and activations, a scale per channel and token"),
    )
}

TORCH_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def cast_weight(name: str, weight: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a weight in another dtype, rounded to nearest even; NaN and Inf stay what they are.

    Raises:
        FewbitsError: If a finite value is beyond the dtype's largest number.
    """
    cast = weight.to(dtype)
    if cast.numel() == 0 or all(extreme.isfinite() for extreme in cast.aminmax()):  # takes no memory
        return cast
    beyond = cast.isinf() & ~weight.isinf()
    if beyond.any():
        format_name = next(known for known, its in TORCH_DTYPES.items() if its == dtype)
        raise FewbitsError(
            f"{name}: {weight[beyond][0].item():.6g} is beyond {format_name}, whose largest number "
            f"is {torch.finfo(dtype).max:.6g}; use bf16 or fp32"
        )
    return cast


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
