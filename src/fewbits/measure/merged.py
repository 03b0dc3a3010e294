"""Which layer of a candidate does what a layer of the reference does, also where one of them has several in one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

_MERGED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
"""A merged layer, and those whose output channels it has, in their order."""


@dataclass(frozen=True)
class Counterpart:
    """A candidate's layer, and which of its output channels: from `start` to before `stop`."""

    module: str
    start: int
    stop: int


def counterparts(
    reference: Mapping[str, tuple[int, int]], candidate: Mapping[str, nn.Module]
) -> dict[str, Counterpart]:
    """The candidate's layers by the reference's names; those without one are left out.

    Args:
        reference: input features and output channels of the reference's layers, by name.
        candidate: the candidate's layers by name.
    """
    found = {}
    for name, shape in reference.items():
        parent, _, leaf = name.rpartition(".")
        if name in candidate:
            if _fits(candidate[name], *shape):
                found[name] = Counterpart(name, 0, shape[1])
            continue
        for merged, parts in _MERGED.items():
            whole, siblings = _sibling(parent, merged), [_sibling(parent, part) for part in parts]
            if leaf in parts and whole in candidate and all(each in reference for each in siblings):
                ends = [sum(reference[each][1] for each in siblings[: index + 1]) for index in range(len(parts))]
                end = ends[parts.index(leaf)]
                if _fits(candidate[whole], shape[0], ends[-1]):
                    found[name] = Counterpart(whole, end - shape[1], end)
    return found


def _sibling(parent: str, leaf: str) -> str:
    return f"{parent}.{leaf}" if parent else leaf


def _fits(module: Any, inputs: int, outputs: int) -> bool:
    """Whether a layer has these features; one that does not say (experts, Conv1D) is taken by its name."""
    return getattr(module, "in_features", inputs) == inputs and getattr(module, "out_features", outputs) == outputs
