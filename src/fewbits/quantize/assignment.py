"""Which precision each group of layers gets: the fewest bytes for a sum of losses, or the least loss for some bytes.

A group has options, each of so many bytes and so much loss. What lies above the lower convex hull of its options is
never worth its bytes. From the cheapest options on, the step with the steepest fall of loss per byte is taken again
and again, over all groups; at each stop no other choice has less loss in as many bytes, but for what a last step
leaves over, which smaller steps then fill.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

Options = Mapping[str, tuple[int, float]]
"""Bytes and loss by the precision's name."""
Assignment = dict[str, str]
"""The precision's name by group."""


@dataclass(frozen=True)
class _Step:
    group: str
    option: str
    nbytes: int
    gain: float

    @property
    def slope(self) -> float:
        return self.gain / self.nbytes


def cheapest(groups: Mapping[str, Options]) -> Assignment:
    """The option of fewest bytes in each group; of two the one of less loss."""
    return {name: min(options, key=lambda each: options[each]) for name, options in groups.items()}


def best(groups: Mapping[str, Options]) -> Assignment:
    """The option of least loss in each group; of two the one of fewer bytes."""
    return {name: min(options, key=lambda each: options[each][::-1]) for name, options in groups.items()}


def fewest_bytes(groups: Mapping[str, Options], most_loss: float) -> Assignment | None:
    """The assignment of fewest bytes whose losses add up to no more than this; None if there is none."""
    chosen = cheapest(groups)
    taken: list[tuple[_Step, str]] = []
    for step in _steps(groups):
        if loss_of(groups, chosen) <= most_loss:
            break
        taken.append((step, chosen[step.group]))
        chosen[step.group] = step.option
    if loss_of(groups, chosen) > most_loss:
        return None
    for step, before in sorted(taken, key=lambda each: -each[0].nbytes):
        without = {**chosen, step.group: before}
        if chosen[step.group] == step.option and loss_of(groups, without) <= most_loss:  # it was not needed after all
            chosen = without
    return chosen


def least_loss(groups: Mapping[str, Options], most_bytes: int) -> Assignment | None:
    """The assignment of least loss that takes no more than so many bytes; None if there is none."""
    chosen = cheapest(groups)
    room = most_bytes - bytes_of(groups, chosen)
    if room < 0:
        return None
    full: set[str] = set()  # groups whose next step did not fit: the one after it builds on that
    for step in _steps(groups):
        if step.group not in full and step.nbytes <= room:
            chosen[step.group] = step.option
            room -= step.nbytes
        else:
            full.add(step.group)
    return chosen


def loss_of(groups: Mapping[str, Options], chosen: Mapping[str, str]) -> float:
    """The sum of an assignment's losses."""
    return sum(groups[name][option][1] for name, option in chosen.items())


def bytes_of(groups: Mapping[str, Options], chosen: Mapping[str, str]) -> int:
    """The bytes of an assignment."""
    return sum(groups[name][option][0] for name, option in chosen.items())


def _steps(groups: Mapping[str, Options]) -> Sequence[_Step]:
    """All steps along the hulls of the groups, the steepest first; of one group they come in their order."""
    steps = [step for name, options in groups.items() for step in _hull_steps(name, options)]
    return sorted(steps, key=lambda step: -step.slope)


def _hull_steps(group: str, options: Options) -> list[_Step]:
    hull: list[tuple[int, float, str]] = []
    for option, (nbytes, loss) in sorted(options.items(), key=lambda each: each[1]):
        if hull and loss >= hull[-1][1]:
            continue
        while len(hull) > 1 and _slope(hull[-2], hull[-1]) <= _slope(hull[-1], (nbytes, loss, option)):
            hull.pop()
        hull.append((nbytes, loss, option))
    return [_Step(group, there[2], there[0] - here[0], here[1] - there[1]) for here, there in pairwise(hull)]


def _slope(here: tuple[int, float, str], there: tuple[int, float, str]) -> float:
    return (here[1] - there[1]) / (there[0] - here[0])
