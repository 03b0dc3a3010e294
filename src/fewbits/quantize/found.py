"""What a search for a contract found."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fewbits.quantize.contract import Contract


@dataclass(frozen=True)
class Assigned:
    """What one layer became.

    Attributes:
        module: Its name.
        precision: Its precision.
        kl_alone: What the predictions lose when its group alone is in that precision, nats per token; None: it was not
            measured, as a layer outside of the blocks.
    """

    module: str
    precision: str
    kl_alone: float | None


@dataclass(frozen=True)
class Trial:
    """A model that was written and checked.

    Attributes:
        bits: Bits per weight of the quantized layers, scales included.
        nbytes: Bytes of its tensors.
        predicted: The sum of what its groups lose alone.
        kl: What it loses on the text that was held out.
        evaluated: What the caller measured; None: nothing.
    """

    bits: float
    nbytes: int
    predicted: float
    kl: float
    evaluated: float | None = None


@dataclass(frozen=True)
class Found:
    """What a search found and wrote.

    Attributes:
        contract: What it had to meet.
        assignment: What each layer became.
        trial: The model that was written.
        tried: All that were checked, in their order.
        left_out: Precisions that were not of use, and why.
        measured: How many losses were measured in this search, and not read from the cache.
    """

    contract: Contract
    assignment: tuple[Assigned, ...]
    trial: Trial
    tried: tuple[Trial, ...]
    left_out: Mapping[str, str]
    measured: int

    def to_json(self) -> dict[str, Any]:
        """Plain data, as the page of a comparison shows it under ``search``."""
        return {
            "target": str(self.contract),
            "met": True,
            "assignment": [vars(each) for each in self.assignment],
            "tried": [{"bits": each.bits, "kl": each.kl} for each in self.tried],
            "left_out": dict(self.left_out),
        }
