"""Parts of a model on disk or in another memory: what accelerate's offloading needs to be told."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

import transformers
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from torch import Tensor, nn
from transformers.integrations.accelerate import load_offloaded_parameter

from fewbits.errors import FewbitsError
from fewbits.models.naming import Place

_T = TypeVar("_T")


def check_device_map(device_map: Any) -> None:
    """Refuse the one kind of map that accelerate accepts and then stumbles over.

    Raises:
        FewbitsError: If ``""`` stands beside other names, and something is on disk.
    """
    if isinstance(device_map, dict) and len(device_map) > 1 and "" in device_map and "disk" in device_map.values():
        raise FewbitsError(
            f"device_map: '' ({device_map['']!r}) stands for the whole model and cannot be beside parts on disk; "
            "name every part, or give device_map='auto' with max_memory="
        )


def with_tied(tensors: Mapping[str, _T], places: Mapping[str, Place], tied: Mapping[str, str]) -> dict[str, _T]:
    """The tensors of a checkpoint, those that it stores once for two parameters under both names.

    A parameter on disk is written there by its own name.

    Args:
        tensors: By their names in the checkpoint.
        places: Where they go.
        tied: Which parameter is tied to which.
    """
    stored = {place.parameter: name for name, place in places.items()}
    found = dict(tensors)
    for pair in tied.items():
        for parameter, other in (pair, pair[::-1]):
            if parameter not in stored and other in stored:
                found[parameter] = tensors[stored[other]]
    return found


@contextmanager
def errors_of_offloading() -> Iterator[None]:
    """Say what is missing when something goes to disk and there is no folder for it."""
    try:
        yield
    except ValueError as error:
        if "`offload_folder`" not in str(error):
            raise
        raise FewbitsError(
            "offload_folder: the device map puts a part of the model on disk; give offload_folder=, a folder for it"
        ) from error


def weight_of(model: transformers.PreTrainedModel, name: str, weight: Tensor) -> Tensor:
    """A weight itself, read from where it is if it is offloaded."""
    return load_offloaded_parameter(model, name) if weight.is_meta else weight


def placed_like(module: nn.Module, other: nn.Module) -> nn.Module:
    """A module that takes its inputs where another one, placed by accelerate, took them; its weights stay in memory."""
    hook = getattr(other, "_hf_hook", None)
    if hook is None:
        return module
    here = AlignDevicesHook(hook.execution_device, io_same_device=hook.io_same_device, skip_keys=hook.skip_keys)
    placed: nn.Module = add_hook_to_module(module, here)
    return placed
