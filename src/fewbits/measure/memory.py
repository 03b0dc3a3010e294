"""How much memory a model's weights take, and how much the process does."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Protocol, TypeGuard, runtime_checkable

import psutil
import torch
from torch import nn

from fewbits.models.linear import QuantHead


@runtime_checkable
class Quantized(Protocol):
    """A module that keeps its weights in a format of its own."""

    def quantized_bits(self) -> tuple[int, int]:
        """Bits stored for codes and scales, and the number of weights that they stand for."""
        ...


def is_quantized(module: nn.Module) -> TypeGuard[Quantized]:
    """Whether a module says how its quantized weights are stored."""
    return isinstance(module, Quantized)


def weight_bytes(model: nn.Module) -> int:
    """Bytes of memory that a model's weights take: parameters and buffers, tied ones once.

    Counted by storage: a view keeps the whole storage alive, so the whole storage counts.
    """
    return _storage_bytes([*model.parameters(), *model.buffers()])


def checkpoint_bytes(model: nn.Module) -> int:
    """Bytes of a checkpoint that holds the model's tensors as they are, tied ones once, headers left out."""
    unique = {_storage_key(part): part.nbytes for tensor in model.state_dict().values() for part in plain_parts(tensor)}
    return sum(unique.values())


def bits_per_weight(model: nn.Module) -> float | None:
    """Mean bits per weight of the quantized layers, codes and scales; of the linear layers if none is quantized.

    Embeddings, norms and the output head (8 bits in memory, 16 on disk, whatever the layers have) are left out, and so
    is a linear layer that was kept in float beside quantized ones: the bytes of the whole model stand for those. None
    if the model has neither kind of layer.
    """
    counts = [
        module.quantized_bits()
        for module in model.modules()
        if is_quantized(module) and not isinstance(module, QuantHead)
    ]
    if not counts:
        linears = [module.weight for module in model.modules() if isinstance(module, nn.Linear)]
        counts = [(8 * weight.element_size() * weight.numel(), weight.numel()) for weight in linears]
    weights = sum(count for _, count in counts)
    return sum(bits for bits, _ in counts) / weights if weights else None


def plain_parts(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    """The plain tensors that a tensor consists of: itself, or the parts of a wrapper (codes, scales)."""
    if not hasattr(tensor, "__tensor_flatten__"):
        yield tensor
        return
    names, _ = tensor.__tensor_flatten__()
    for name in names:
        yield from plain_parts(getattr(tensor, name))


def resident_bytes() -> int:
    """Bytes of RAM that this process holds now (RSS)."""
    return int(psutil.Process().memory_info().rss)


def peak_resident_bytes() -> int:
    """The most bytes of RAM that this process has held (peak RSS).

    Linux's own high-water mark is read where there is one: `getrusage` there begins at the size of the parent
    process, which a small child of a large parent never reaches.
    """
    status = Path("/proc/self/status")
    if status.exists():
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    if sys.platform == "win32":
        return int(psutil.Process().memory_info().peak_wset)
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # KiB everywhere but on macOS


def _storage_bytes(tensors: Iterable[torch.Tensor]) -> int:
    unique = {_storage_key(part): part.untyped_storage().nbytes() for tensor in tensors for part in plain_parts(tensor)}
    return sum(unique.values())


def _storage_key(tensor: torch.Tensor) -> tuple[str, int]:
    # A meta tensor's address is 0, like every other's: the tensor itself tells it apart.
    return str(tensor.device), tensor.untyped_storage().data_ptr() or id(tensor)
