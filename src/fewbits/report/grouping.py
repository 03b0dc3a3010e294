"""Rows of equal layers, told as one: `model.layers.{0..29}.mlp.down_proj`."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Protocol, TypeVar

_NUMBER = re.compile(r"(?<=\.)\d+(?=\.|$)|^\d+(?=\.)")  # a whole part of a dotted name: layers.12.mlp, not conv2


class ManifestLike(Protocol):
    """What a row of a manifest is read for."""

    @property
    def module(self) -> str:
        """Name of the module (of the tensor, for a bias)."""

    @property
    def shape(self) -> Sequence[int]:
        """Shape of the tensor."""

    @property
    def format(self) -> str:
        """Name of the format that it gets."""

    @property
    def nbytes(self) -> int:
        """Bytes that it takes in that format."""

    @property
    def reason(self) -> str | None:
        """Why it is not quantized; None if it is."""


R = TypeVar("R", bound=ManifestLike)


def group_rows(rows: Iterable[R]) -> list[tuple[str, list[R]]]:
    """Rows that differ in nothing but the numbers in their names, together, in the order of their first.

    Returns:
        For each group its name, with each number that varies as a set, and its rows. The name stands for exactly
        those rows: sets of two numbers are shown only if every pair is there.
    """
    alike: dict[tuple[object, ...], list[R]] = {}
    for row in rows:
        key = (_NUMBER.sub("{}", row.module), tuple(row.shape), row.format, row.nbytes, row.reason)
        alike.setdefault(key, []).append(row)
    return [group for members in alike.values() for group in _exact_groups(members)]


def _exact_groups(rows: list[R]) -> Iterator[tuple[str, list[R]]]:
    """Split rows of one template until the sets in the name stand for these rows and no others."""
    numbers = [tuple(int(number) for number in _NUMBER.findall(row.module)) for row in rows]
    columns = [sorted(set(column)) for column in zip(*numbers, strict=True)]
    if math.prod(len(column) for column in columns) == len(rows):
        sets = iter(columns)
        yield _NUMBER.sub(lambda _: number_set(next(sets)), rows[0].module), rows
        return
    varying = next(index for index, column in enumerate(columns) if len(column) > 1)
    for value in columns[varying]:
        yield from _exact_groups([row for row, found in zip(rows, numbers, strict=True) if found[varying] == value])


def number_set(numbers: Sequence[int]) -> str:
    """Ascending numbers in short: `7`, `{0..29}`, `{0,2,5..9}`."""
    if len(numbers) == 1:
        return str(numbers[0])
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    parts = [_run(first, last) for first, last in runs]
    return "{" + ",".join(parts) + "}"


def _run(first: int, last: int) -> str:
    if last - first < 2:
        return str(first) if first == last else f"{first},{last}"
    return f"{first}..{last}"
