"""A contract on loss: how far a converted model may be from its original, and how large it may be."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from fewbits.errors import FewbitsError
from fewbits.models.precision import Precision, precision_named

_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12,
          "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}  # fmt: skip
_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*")


@dataclass(frozen=True)
class Contract:
    """What a converted model has to meet.

    Attributes:
        max_kl: The largest KL divergence from the model in fp32, nats per token; None: any.
        max_bytes: The most bytes of its weights on disk; None: any number.
    """

    max_kl: float | None
    max_bytes: int | None

    @classmethod
    def of(cls, max_kl: float | None, max_size: str | int | None) -> Contract | None:
        """The contract that these make, or None if neither is given.

        Raises:
            FewbitsError: If a limit is no positive number, or a size is misspelt.
        """
        if max_kl is None and max_size is None:
            return None
        if max_kl is not None and not (math.isfinite(max_kl) and max_kl > 0):
            raise FewbitsError(f"max_kl is {max_kl}: a positive number of nats per token is needed, such as 0.01")
        return cls(max_kl, None if max_size is None else bytes_named(max_size))

    def __str__(self) -> str:
        """As users write it."""
        parts = [] if self.max_kl is None else [f"max_kl {self.max_kl:g}"]
        return " and ".join([*parts, *([] if self.max_bytes is None else [f"max_size {self.max_bytes:,} bytes"])])


def bytes_named(size: str | int) -> int:
    """The bytes of a size such as ``3GiB``, ``500 MB`` or 1000000.

    Raises:
        FewbitsError: If it is none, or not positive.
    """
    found = _SIZE.fullmatch(str(size))
    unit = found and _UNITS.get(found[2].upper())
    nbytes = int(float(found[1]) * unit) if found and unit else 0
    if nbytes < 1:
        raise FewbitsError(f"max_size {size!r} is no size; write bytes, or a number and a unit, such as 3GiB or 500MB")
    return nbytes


def allowed_precisions(to: str | None, writes: tuple[str, ...]) -> list[Precision]:
    """The precisions that a search may choose from.

    Args:
        to: Their names with commas between them; None: all that the layout can say.
        writes: Those that the layout can say.

    Raises:
        FewbitsError: If one is unknown, a cast, named twice, or not of the layout.
    """
    names = list(writes) if to is None else [name.strip() for name in to.split(",")]
    found = [precision_named(name) for name in names]
    for precision in found:
        if precision.cast:
            raise FewbitsError(f"to: {precision.name} is a cast; a contract chooses among {', '.join(writes)}")
        if precision.name not in writes:
            raise FewbitsError(f"to: {precision.name} cannot be written in this layout; it can {', '.join(writes)}")
        if names.count(precision.name) > 1:
            raise FewbitsError(f"to: {precision.name} is named twice; name it once")
    return found
