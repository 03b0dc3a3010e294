"""What a conversion wrote, whatever the layout."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from fewbits.models.manifest import ManifestRow
from fewbits.models.quantized_source import QuantizedSource
from fewbits.models.source import Source
from fewbits.tensors.cast_report import CastReport


@dataclass(frozen=True)
class Conversion:
    """What a conversion wrote.

    Attributes:
        path: The folder.
        precision: The precision's name.
        nbytes: Bytes of all tensors.
        manifest: Each tensor's format, bytes, or why it is kept.
        casts: Of a cast, what it did to each tensor; empty if layers were quantized.
        rounding: What became of weights that were quantized before; None if they were not.
    """

    path: Path
    precision: str
    nbytes: int
    manifest: tuple[ManifestRow, ...]
    casts: tuple[CastReport, ...] = ()
    rounding: str | None = None


def told_rounding(source: Source, to: str, *, taken_over: bool) -> str | None:
    """What becomes of weights that come quantized already; None if they do not.

    Args:
        source: Where they come from.
        to: What they become.
        taken_over: Whether codes and scales are written as they are.
    """
    if not isinstance(source, QuantizedSource):
        return None
    stored = source.precision_name
    if taken_over:
        return f"codes and scales of {stored} are taken over as they are"
    return f"weights were rounded to {stored} before and are rounded again, to {to}"
