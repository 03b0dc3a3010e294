"""Parameters that ``fully_shard`` has cut: each process keeps some rows of each, as a DTensor.

The optimizer sweep works on the local rows. What belongs to a parameter element by element goes into a state dict as a
DTensor of the same cut, so ``torch.distributed.checkpoint`` can load it on another number of processes.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from fewbits.errors import FewbitsError


def is_sharded(tensor: Tensor) -> bool:
    """Whether this is a DTensor."""
    return hasattr(tensor, "device_mesh") and hasattr(tensor, "placements")


def local(tensor: Tensor) -> Tensor:
    """The rows that are here, sharing memory; any other tensor as it is."""
    return tensor.detach().to_local() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]


def shard_dimensions(tensor: Tensor) -> list[int]:
    """The dimensions of the mesh that a tensor is cut along; none if it is no DTensor."""
    if not is_sharded(tensor):
        return []
    placements: Any = tensor.placements  # type: ignore[attr-defined]
    return [dimension for dimension, placement in enumerate(placements) if placement.is_shard()]


def shard_index(tensor: Tensor) -> tuple[int, int]:
    """Which shard of a DTensor is here, and of how many; processes that hold copies say the same."""
    mesh: Any = tensor.device_mesh  # type: ignore[attr-defined]
    index, count = 0, 1
    for dimension in shard_dimensions(tensor):
        index = index * mesh.size(dimension) + mesh.get_local_rank(dimension)
        count *= mesh.size(dimension)
    return index, count


def cut_like(param: Tensor, rows: Tensor) -> Tensor:
    """A DTensor of local rows, cut as a parameter is; they share memory."""
    from torch.distributed.tensor import DTensor  # slow to import, and only needed here

    mesh: Any = param.device_mesh  # type: ignore[attr-defined]
    placements: Any = param.placements  # type: ignore[attr-defined]
    return DTensor.from_local(rows, mesh, placements, run_check=False, shape=param.shape, stride=param.stride())


def named_for_all(param: Tensor, held: dict[str, Tensor]) -> dict[str, Tensor]:
    """What belongs to the local rows of a parameter, for a state dict of all processes.

    Tensors of the rows' shape become DTensors. Others, the scales of 8-bit moments, of which each shard has its own,
    get names that say the shard.
    """
    index, count = shard_index(param)
    shape = local(param).shape
    return {
        name if tensor.shape == shape else f"{name} shard {index} of {count}": (
            cut_like(param, tensor) if tensor.shape == shape else tensor
        )
        for name, tensor in held.items()
    }


def saved_tensor(saved: dict[str, Any], name: str, key: str) -> Tensor:
    """An entry of a parameter's saved state.

    Raises:
        FewbitsError: It is not there.
    """
    if key not in saved:
        raise FewbitsError(
            f"state dict: {name} has no {key!r}, only {', '.join(sorted(saved))}; the scales of 8-bit moments are "
            "those of a shard: resume on as many processes as it was saved on"
        )
    tensor: Tensor = saved[key]
    return tensor
