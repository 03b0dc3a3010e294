"""Checkpoints that all processes write and read together: each its own shard, by ``torch.distributed.checkpoint``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from fewbits.errors import FewbitsError
from fewbits.train.mixed_precision import MixedPrecision
from fewbits.train.optimizer import TorchStep

_HISTORY = "mixed_precision.history."


def save_sharded(mp: MixedPrecision, folder: str | Path, **more: Any) -> None:
    """Save the state of a run; call it on all processes, between steps.

    Args:
        mp: The run.
        folder: Where to; all processes see it.
        more: State dicts of other things, such as ``scheduler=scheduler.state_dict()``.
    """
    save({"mixed_precision": mp.state_dict(), **more}, checkpoint_id=folder)


def load_sharded(mp: MixedPrecision, folder: str | Path, **more: Any) -> dict[str, Any]:
    """Go on with the same bits; call it on all processes.

    On another number of processes shards are cut anew; only the scales of 8-bit moments cannot be.

    Args:
        mp: A run of the same recipe, made in the same way.
        folder: Where ``save_sharded`` has written.
        more: State dicts as given to ``save_sharded``, of what is to be loaded.

    Returns:
        Those of ``more``, loaded: give them to ``load_state_dict``.

    Raises:
        FewbitsError: No checkpoint there, or one of another recipe or kind of optimizer, or cut otherwise.
    """
    if not (Path(folder) / ".metadata").is_file():
        raise FewbitsError(f"{folder}: no checkpoint of save_sharded is there; was it interrupted while writing?")
    if isinstance(mp._updater, TorchStep) and not mp.optimizer.state:
        # Only what is there can be filled: this makes the optimizer's state, without changing weights.
        get_optimizer_state_dict(mp.model, mp.optimizer)
    state = {"mixed_precision": mp.state_dict(), **more}
    saved = FileSystemReader(folder).read_metadata().state_dict_metadata
    for name, tensor in saved.items():  # a run that has made no step has no history yet to be filled
        if name.startswith(_HISTORY) and isinstance(tensor, TensorStorageMetadata):
            empty = torch.zeros(tensor.size, dtype=tensor.properties.dtype)
            state["mixed_precision"]["history"].setdefault(name.removeprefix(_HISTORY), empty)
    _check_names(state, set(saved), folder)
    load(state, checkpoint_id=folder)
    mp.load_state_dict(state.pop("mixed_precision"))
    return state


def _check_names(state: dict[str, Any], saved: set[str], folder: str | Path) -> None:
    missing = sorted(set(_leaves(state)) - saved)
    if missing:
        raise FewbitsError(
            f"{folder}: the checkpoint has no {missing[0]!r} ({len(missing)} of {len(saved)} names differ); take the "
            "recipe and the optimizer that it was saved with, and with 8-bit moments the same number of processes"
        )


def _leaves(state: Any, path: str = "") -> list[str]:
    """Names of the tensors of a nested state, joined by dots."""
    if isinstance(state, dict):
        return [leaf for key, value in state.items() for leaf in _leaves(value, f"{path}.{key}" if path else str(key))]
    return [path] if hasattr(state, "data_ptr") else []
