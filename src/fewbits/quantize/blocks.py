"""The blocks of a model one at a time: their weights are read when their turn comes, and text runs through them.

Letters: W windows, T tokens in each, H hidden features.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import transformers
from torch import Tensor, nn

from fewbits.errors import FewbitsError
from fewbits.models.naming import Place
from fewbits.models.quantizable import Weight, output_head
from fewbits.models.source import Source


class Blocks:
    """The one stack of blocks that a model is, and what the next of them is given.

    Attributes:
        prefix: What names of parameters in blocks begin with, a point at its end.
        inputs: What the next block is given, ``[1, T, H]`` of each window; empty before the first is caught.
    """

    def __init__(
        self, source: Source, model: transformers.PreTrainedModel, places: Mapping[str, Place], windows: Tensor
    ) -> None:
        """Prepare; nothing is read yet.

        Args:
            source: Where tensors are read from.
            model: The model, on the meta device; it is copied.
            places: Where each stored tensor goes.
            windows: Token ids ``[W, T]``.

        Raises:
            FewbitsError: If the model is not one stack of blocks.
        """
        self._source, self._windows = source, windows
        self._model = copy.deepcopy(model).eval().requires_grad_(False)
        self._stored = {place.parameter: name for name, place in places.items() if place.converter is None}
        self.prefix, self._blocks = stack_of(self._model)
        self.inputs: list[Tensor] = []
        self._arguments: dict[str, Any] = {}

    def __len__(self) -> int:
        return len(self._blocks)

    def path(self, index: int) -> str:
        """What names of a block's parameters begin with."""
        return f"{self.prefix}{index}."

    def indices(self) -> dict[str, int]:
        """The block of each stored tensor that is in one."""
        inside = {name: each for each, name in self._stored.items() if each.startswith(self.prefix)}
        return {name: int(each.removeprefix(self.prefix).split(".")[0]) for name, each in inside.items()}

    def filled(self, index: int) -> nn.Module:
        """A block with its weights in float32.

        Raises:
            FewbitsError: If a weight is stored in other pieces than the block holds it.
        """
        block, path = copy.deepcopy(self._blocks[index]), self.path(index)
        for name, _ in list(block.named_parameters()):
            if f"{path}{name}" not in self._stored:
                raise _stored_in_another_way(f"{path}{name}", self._model)
            self._put(block, name, self._stored[f"{path}{name}"])
        return block

    def through(self, block: nn.Module, x: Tensor) -> Tensor:
        """What a block makes of one window."""
        out = block(x, **self._arguments)
        result: Tensor = out[0] if isinstance(out, tuple) else out
        return result

    def catch(self) -> None:
        """Find out what the first block is given: the model runs as far as that."""
        head = output_head(self._model)
        for name, _ in list(self._model.named_parameters()):
            if not name.startswith(self.prefix) and name != head and name in self._stored:
                self._put(self._model, name, self._stored[name])
        self.inputs = []
        hook = self._blocks[0].register_forward_pre_hook(self._caught, with_kwargs=True)
        for window in self._windows:
            try:
                self._model(input_ids=window[None], use_cache=False)
            except _Caught:
                continue
            raise AssertionError("the first block was not reached")
        hook.remove()

    def _caught(self, block: nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> None:
        named = dict(named)
        self.inputs.append(given[0] if given else named.pop("hidden_states"))
        named.pop("hidden_states", None)
        self._arguments = {name: value for name, value in named.items() if name != "past_key_values"}
        raise _Caught

    def _put(self, module: nn.Module, name: str, stored: str) -> None:
        owner, _, leaf = name.rpartition(".")
        holder = module.get_submodule(owner)
        setattr(holder, leaf, nn.Parameter(self._source.read(stored).float(), requires_grad=False))


class _Caught(Exception):  # noqa: N818  # no error: it ends a forward pass that has gone far enough
    pass


def stack_of(model: transformers.PreTrainedModel) -> tuple[str, nn.ModuleList]:
    """The name, with a point behind it, and the modules of the one stack of blocks that a model is."""
    stacks = {name: module for name, module in model.named_modules() if isinstance(module, nn.ModuleList)}
    outer = {name: each for name, each in stacks.items() if not any(name.startswith(f"{other}.") for other in stacks)}
    if len(outer) != 1:
        raise FewbitsError(
            f"calibrate: {type(model).__name__} has {len(outer)} stacks of blocks, and only models of one can be "
            "calibrated; convert without it"
        )
    name, blocks = next(iter(outer.items()))
    return f"{name}.", blocks


def check_stored_as_held(
    model: transformers.PreTrainedModel, places: Mapping[str, Place], weights: Mapping[str, Weight]
) -> None:
    """Refuse a model whose layers cannot be quantized one by one, from its own weights.

    Args:
        model: The model.
        places: Where each stored tensor goes.
        weights: The weights to quantize, by stored name.

    Raises:
        FewbitsError: If one is stored in other pieces than the model holds, or is no matrix of a linear layer.
    """
    for name, weight in weights.items():
        if places[name].converter is not None or weight.kind != "linear":
            raise _stored_in_another_way(name, model)


def _stored_in_another_way(name: str, model: transformers.PreTrainedModel) -> FewbitsError:
    return FewbitsError(
        f"calibrate: {name} is stored in another way than {type(model).__name__} holds it; such models cannot be "
        "calibrated, convert without it"
    )
