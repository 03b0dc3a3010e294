"""The memory that a plan is for: what the user says, or what this machine has, and how fast it is read."""

from __future__ import annotations

import re
import time
from dataclasses import dataclass

import torch

from fewbits.errors import FewbitsError
from fewbits.measure.machine import Machine, this_machine

_UNITS = {"": 1} | {f"{letter}{i}B": base ** (power + 1) for power, letter in enumerate("KMGT")
                    for i, base in (("i", 1024), ("", 1000))}  # fmt: skip
_SIZE = re.compile(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([A-Za-z]*)\s*")
_PROBE_BYTES = 1 << 28  # far more than caches hold
_PROBE_SECONDS = 0.4


@dataclass(frozen=True)
class Memory:
    """One memory that a model could be in.

    Attributes:
        name: ``RAM``, a GPU's name, or ``given``.
        nbytes: What a model may take of it.
        device: ``cpu``, or ``cuda:0`` and so on.
    """

    name: str
    nbytes: int
    device: str = "cpu"


def parse_memory(text: str | int) -> int:
    """Bytes of a size such as ``24GiB``, ``24GB``, ``512MiB``, or a plain number of bytes.

    Raises:
        FewbitsError: It is none, or not above 0.
    """
    known = ", ".join(unit for unit in _UNITS if unit)
    found = _SIZE.fullmatch(text) if isinstance(text, str) else None
    units = {unit.lower(): size for unit, size in _UNITS.items()}
    unit = found[2].lower() if found else ""
    if isinstance(text, str) and (found is None or unit not in units):
        raise FewbitsError(f"memory: {text!r} is no size; give a number and one of {known}, such as 24GiB")
    nbytes = int(float(found[1]) * units[unit]) if found else text
    if isinstance(nbytes, bool) or not isinstance(nbytes, int) or not 0 < nbytes < 2**63:
        raise FewbitsError(f"memory: {text!r} is no amount of memory; give a size above 0, such as 24GiB")
    return nbytes


def memories(given: str | int | None) -> tuple[Memory, ...]:
    """The memories to plan for: the given one, or the GPUs and RAM of this machine, GPUs first.

    Raises:
        FewbitsError: The given size is none; or none is given and the machine does not tell what it has.
    """
    if given is not None:
        return (Memory("given", parse_memory(given)),)
    found = memories_of(this_machine())
    if not found:
        raise FewbitsError("this machine does not tell how much memory it has; give --memory, such as --memory 24GiB")
    return found


def memories_of(machine: Machine) -> tuple[Memory, ...]:
    """What a model may take of a machine: each GPU's memory, and the RAM that is available now."""
    gpus = [Memory(gpu.name, gpu.memory_bytes, f"cuda:{index}") for index, gpu in enumerate(machine.gpus)]
    ram = [Memory("RAM", machine.available_bytes)] if machine.available_bytes > 0 else []
    return (*gpus, *ram)


def read_bandwidth(device: str = "cpu") -> float | None:
    """Bytes that a device reads per second: the best of some passes over 256 MiB, in less than a second.

    Returns:
        None where there is no room for the probe.
    """
    if device == "cpu" and _available() < 4 * _PROBE_BYTES:
        return None
    try:
        numbers = torch.ones(_PROBE_BYTES // 4, device=device)
    except RuntimeError:  # no room
        return None
    seconds: list[float] = []
    started = time.perf_counter()
    while not seconds or time.perf_counter() - started < _PROBE_SECONDS:
        before = time.perf_counter()
        float(numbers.sum())  # waits for the device
        seconds.append(time.perf_counter() - before)
    return numbers.nbytes / min(seconds)


def _available() -> int:
    import psutil

    return int(psutil.virtual_memory().available)
