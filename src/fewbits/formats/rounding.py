"""How a number that a format does not hold becomes one that it holds: six roundings, two overflow rules."""

from __future__ import annotations

import re
from collections.abc import Iterable
from difflib import get_close_matches
from enum import StrEnum
from typing import Self

from fewbits.errors import FewbitsError

RANDOM_BITS = 32
"""Stochastic rounding consumes one random integer of this many bits per value."""


class _Choice(StrEnum):
    """A name that users type; looked up with the nearest name suggested."""

    @classmethod
    def named(cls, name: str, also: Iterable[str] = ()) -> Self:
        """Look up a choice by name.

        Args:
            name: the name, in any case; `-` and `_` are the same.
            also: other names that would have been right, for the message.

        Raises:
            FewbitsError: no such name; the message suggests the nearest one and lists all.
        """
        wanted = str(name).lower().replace("-", "_")
        choices = [str(choice) for choice in cls]
        if wanted in choices:
            return cls(wanted)
        choices.extend(also)
        near = get_close_matches(wanted, choices, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise FewbitsError(f"unknown {cls._what()} {name!r}: {hint}choose from {', '.join(choices)}")

    @classmethod
    def _what(cls) -> str:
        return re.sub(r"(?<=[a-z])(?=[A-Z])", " ", cls.__name__).lower()


class Rounding(_Choice):
    """Which of the two neighbours of an unrepresentable number stands for it (IEEE 754-2019, section 4.3)."""

    NEAREST_EVEN = "nearest_even"
    """The nearer one; in a tie the one with an even significand, and where both are odd (one-bit significands,
    e8m0fnu) the one larger in magnitude, as IEEE 754-2019, section 4.3.1, says."""
    NEAREST_AWAY = "nearest_away"
    """The nearer one; in a tie the one larger in magnitude."""
    TOWARD_ZERO = "toward_zero"
    """The one smaller in magnitude: truncation."""
    UP = "up"
    """The one toward +Inf."""
    DOWN = "down"
    """The one toward -Inf."""
    STOCHASTIC = "stochastic"
    """Either, at random: the one larger in magnitude with probability (|x| - |lower|) / (|upper| - |lower|), to
    within 2^-32. A representable number never moves."""


class Overflow(_Choice):
    """What becomes of a number whose rounded magnitude exceeds the largest finite one, and of Inf."""

    SATURATE = "saturate"
    """The largest finite value, sign kept; Inf as well (OCP OFP8 and MX call this saturation mode)."""
    IEEE = "ieee"
    """Inf where the format has one, else NaN. Roundings toward zero stop at the largest finite value, as in
    IEEE 754-2019, section 7.4; Inf itself stays Inf (or NaN) under every rounding."""


class ScaleRule(_Choice):
    """How the shared scale of a block follows from the largest magnitude in it, amax.

    The first four are for MX, whose scales are powers of two; emax is the exponent of the largest element value, and
    mantissa the element's mantissa bits. The last two are for NVFP4.
    """

    FLOOR = "floor"
    """2^(floor(log2 amax) - emax): OCP MX 1.0, section 6.3. amax itself may saturate, by up to a factor of 2."""
    CEIL = "ceil"
    """2^(ceil(log2 amax) - emax): nothing saturates; up to one bit of precision is lost."""
    EVEN = "even"
    """Floor, after amax is rounded to the element's precision: no more than rounding saturates."""
    RCEIL = "rceil"
    """The smallest power of two that brings amax to at most the largest element value (cuBLAS; PTX cvt.rp)."""
    TWO_LEVEL = "two_level"
    """Tensor scale amax(tensor) / (448 · 6) in fp32, block scale amax / (6 · tensor scale) in e4m3fn."""
    ONE_LEVEL = "one_level"
    """Block scale amax / 6 in e4m3fn; the tensor scale is 1."""
