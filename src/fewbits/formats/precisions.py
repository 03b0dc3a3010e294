"""The precisions that a model can be given, as plain data: `models.precision` makes them what layers know.

They lie here so that what computes with sizes alone (the plan, the explore page) needs nothing else.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class StoredPrecision:
    """Which formats the layers' weights and activations take.

    Attributes:
        name: As users write it, `--to int8`.
        weights: Name of the format of the weights of quantized layers.
        activations: Name of the format that activations are quantized to; None: they stay as they are.
        group_size: Input features that share a scale; None: all of an output channel.
        cast: Whether every tensor takes the format by a cast, with no scales.
        summary: What it is, for a listing.
    """

    name: str
    weights: str
    activations: str | None
    group_size: int | None
    cast: bool
    summary: str


def _cast(name: str, summary: str) -> StoredPrecision:
    return StoredPrecision(name, name, None, None, True, summary)


def _quantized(
    name: str, weights: str, activations: str | None, group_size: int | None, summary: str
) -> StoredPrecision:
    return StoredPrecision(name, weights, activations, group_size, False, summary)


STORED_PRECISIONS = (
    _cast("fp32", "every tensor in 32 bits"),
    _cast("bf16", "every tensor in bfloat16"),
    _cast("fp16", "every tensor in half precision"),
    _quantized("int8", "int8", "int8", None, "8-bit weights and activations, a scale per channel and token"),
    _quantized("int8-weight", "int8", None, 128, "8-bit weights in groups, activations as they are"),
    _quantized("int4", "int4", "int8", 128, "4-bit weights in groups, 8-bit activations, a scale per token"),
    _quantized("nf4", "nf4", None, 64, "4-bit NormalFloat weights in groups, activations as they are"),
    _quantized("mxfp4", "e2m1fn", None, 32, "4-bit floats, a power of two to 32 weights, activations as they are"),
    _quantized("fp8", "e4m3fn", "e4m3fn", None, "FP8 weights and activations, a scale per channel and token"),
)
