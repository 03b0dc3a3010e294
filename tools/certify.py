"""Certify the casts from float32: every one of its 2^32 bit patterns, encoded and held against an independent oracle.

    python tools/certify.py [--slice N] [--formats fp16,bf16,e4m3fn,e5m2]

The oracle shares no code with the casts, only the exact value of each code. It computes, in fractions, the float32 at
which rounding to nearest even moves from one code to the next, and counts how many of those an input has passed:

    code      c        c+1          The midpoint of neighbours is itself a float32 (checked). It belongs to the even
         -----|----x----|----       one of the two codes: the threshold is the midpoint if c+1 is even, else the
               midpoint             float32 after it.

Positive float32 ascend with their bits, so thresholds and inputs are compared as integers. Beyond the range a format
with Inf gives Inf, e4m3fn its largest value; NaN gives the one code that the format documents.

Exit code 0 if all inputs agree, 1 if any does not, with the first of them. `--slice N` takes one input at random (the
same each time) from each of N strata of equal size, and every threshold with its two neighbours.
"""

from __future__ import annotations

import argparse
import struct
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

import fewbits
from fewbits.formats import Format, exact
from fewbits.kernels import native

_NAN = {"fp16": 0x7E00, "bf16": 0x7FC0, "e4m3fn": 0x7F, "e5m2": 0x7E}
"""The code of NaN: positive, quiet (the first mantissa bit set), no payload; e4m3fn has but one."""

FORMATS = tuple(_NAN)
SHOWN = 10  # mismatches of a format that are printed
CHUNK = 1 << 22  # inputs at a time
_INF = 0x7F800000
_SIGN = 0x80000000
_SEED = 754

Encode = Callable[[torch.Tensor, str], Any]


@dataclass(frozen=True)
class Oracle:
    """What nearest_even makes of each magnitude of float32.

    Attributes:
        thresholds: ascending bit patterns of float32; passing one, itself included, is one step in `codes`.
        codes: one more than there are thresholds.
        sign: the sign bit of a code.
        nan: the code of NaN, which has no sign.
    """

    thresholds: np.ndarray
    codes: np.ndarray
    sign: int
    nan: int

    @classmethod
    def of(cls, name: str) -> Oracle:
        """Compute the thresholds of a format with Inf or NaN, subnormals and -0."""
        fmt = Format.named(name)
        values = [value for code in range(fmt.sign_bit) if isinstance(value := exact.decode(code, fmt), Fraction)]
        if fmt.has_inf:  # it lies where one value more would be
            values.append(2 * values[-1] - values[-2])
        thresholds = [_threshold(*pair, code + 1) for code, pair in enumerate(pairwise(values))]
        codes = list(range(len(values)))
        code_type = np.uint8 if fmt.bits <= 8 else np.uint16
        return cls(np.array(thresholds, np.uint32), np.array(codes, code_type), fmt.sign_bit, _NAN[fmt.name])

    def of_range(self, start: int, stop: int) -> np.ndarray:
        """The codes of the magnitudes whose bits are start, start + 1, …, stop - 1."""
        last = min(stop, _INF + 1)
        first, end = np.searchsorted(self.thresholds, [start, last - 1], side="right")
        edges = [start, *self.thresholds[first:end].tolist(), max(last, start)]
        codes = np.full(stop - start, self.nan, self.codes.dtype)
        codes[: max(last - start, 0)] = np.repeat(self.codes[first : end + 1], np.diff(edges))
        return codes

    def of_each(self, magnitudes: np.ndarray) -> np.ndarray:
        """The codes of magnitudes in any order, given as the bits of float32."""
        codes = self.codes[np.searchsorted(self.thresholds, magnitudes, side="right")]
        return np.where(magnitudes > _INF, self.nan, codes).astype(self.codes.dtype)

    def negative(self, codes: np.ndarray) -> np.ndarray:
        """The codes of the same inputs with the other sign; NaN has none."""
        return np.where(codes == self.nan, codes, codes | self.codes.dtype.type(self.sign))


def _threshold(lower: Fraction, upper: Fraction, upper_code: int) -> int:
    """The bits of the first float32 that rounds to the upper of two neighbours."""
    middle = (lower + upper) / 2
    (bits,) = struct.unpack("<I", struct.pack("<f", middle))
    if Fraction(_float(bits)) != middle:
        raise ValueError(f"{middle} is between two values and is no float32: this oracle cannot judge the format")
    return int(bits) + upper_code % 2


def _float(bits: int) -> float:
    return float(struct.unpack("<f", struct.pack("<I", bits))[0])


@dataclass(frozen=True)
class Mismatch:
    """One input on which cast and oracle differ."""

    name: str
    bits: int
    got: int
    expected: int

    def __str__(self) -> str:
        number = f"{_float(self.bits)!r} (0x{self.bits:08X})"
        return f"{self.name}: {number} gives code {self.got:#x}, {self.expected:#x} is right"


def inputs_in_all(oracle: Oracle) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Every magnitude, chunk by chunk, and its codes."""
    for start in range(0, _SIGN, CHUNK):
        yield np.arange(start, start + CHUNK, dtype=np.uint32), oracle.of_range(start, start + CHUNK)


def inputs_of_slice(oracle: Oracle, count: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """One magnitude out of each of `count` strata, and each threshold with its neighbours; and their codes."""
    strata = np.linspace(0, _SIGN, count + 1).astype(np.int64)
    drawn = np.random.default_rng(_SEED).integers(strata[:-1], strata[1:])
    edges = np.array([0, 1, 0x007FFFFF, 0x00800000, _INF - 1, _INF, _INF + 1, 0x7FC00000, _SIGN - 1])
    around = (oracle.thresholds.astype(np.int64)[:, None] + [-1, 0, 1]).ravel()
    magnitudes = np.unique(np.concatenate([drawn, edges, around])).astype(np.uint32)
    yield magnitudes, oracle.of_each(magnitudes)


def certify(
    name: str,
    oracle: Oracle,
    inputs: Iterator[tuple[np.ndarray, np.ndarray]],
    encode: Encode = fewbits.encode,
    step: Callable[[int], None] = lambda inputs: None,
) -> tuple[int, list[Mismatch]]:
    """Encode the inputs with both signs.

    Args:
        name: the format.
        oracle: its oracle.
        inputs: chunks of magnitudes, as the bits of float32, and the codes that are right for them.
        encode: what is certified.
        step: called with the number of inputs done since the last call.

    Returns:
        How many inputs differ, and the first `SHOWN` of them.
    """
    wrong = 0
    first: list[Mismatch] = []
    for magnitudes, positive in inputs:
        for sign in (0, _SIGN):
            bits = magnitudes | np.uint32(sign)
            expected = oracle.negative(positive) if sign else positive
            got = encode(torch.from_numpy(bits.view(np.float32)), name).numpy()
            differing = np.flatnonzero(got != expected)
            wrong += differing.size
            shown = differing[: SHOWN - len(first)].tolist()
            first += [Mismatch(name, int(bits[at]), int(got[at]), int(expected[at])) for at in shown]
            step(len(bits))
    return wrong, first


def main(arguments: list[str] | None = None) -> int:
    """Parse, certify each format, print; the exit code."""
    options = _parse(arguments)
    console, wrong_in_all = Console(highlight=False, soft_wrap=True), 0
    console.print(f"fewbits, {native.status().isa} kernels, {torch.get_num_threads()} threads")
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        for name in options.formats:
            started, oracle = time.perf_counter(), Oracle.of(name)
            if options.slice:
                inputs, total = inputs_of_slice(oracle, options.slice), None
            else:
                inputs, total = inputs_in_all(oracle), 1 << 32
            task = progress.add_task(name, total=total)
            wrong, first = certify(name, oracle, inputs, step=partial(progress.advance, task))
            verdict = f"{wrong:,} WRONG" if wrong else "all right"
            done, seconds = int(progress.tasks[task].completed), time.perf_counter() - started
            console.print(f"{name}: {done:,} inputs, {verdict}, {seconds:.1f} s")
            for mismatch in first:
                console.print(f"  {mismatch}")
            wrong_in_all += wrong
    return int(wrong_in_all > 0)


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--slice", type=int, metavar="N", help="N strata of magnitudes in place of all 2^31")
    parser.add_argument("--formats", default=",".join(FORMATS), help="which, separated by commas")
    options = parser.parse_args(arguments)
    options.formats = options.formats.split(",")
    for name in options.formats:
        if name not in FORMATS:
            parser.error(f"--formats: {name!r} is not certified; {', '.join(FORMATS)} are")
    if options.slice is not None and options.slice < 1:
        parser.error(f"--slice {options.slice}: give 1 or more")
    return options


if __name__ == "__main__":
    sys.exit(main())
