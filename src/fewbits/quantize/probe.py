"""A model in float32 in which single layers are quantized for a moment, to see what the predictions lose by it.

    text -> block 0 -> block 1 -> …  -> head      once, as it is: what each block is given, and the predictions
                       |
              from here on again, with some of this block's layers quantized: KL to the predictions above

Layers are quantized as a loaded model has them: the same codes and scales, activations rounded, by the same kernels.

Letters: W windows, T tokens in each, P positions looked at, V tokens of the vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from fewbits.errors import FewbitsError
from fewbits.models.architecture import auto_class_of
from fewbits.models.linear import QuantLinear
from fewbits.models.loading import Loading
from fewbits.models.precision import PRECISIONS, Precision
from fewbits.quantize.blocks import stack_of
from fewbits.quantize.held_out import log_probabilities
from fewbits.quantize.prepared import Prepared
from fewbits.tensors.divergence import kl_divergence
from fewbits.tensors.quantized import QuantizedTensor, quantize_weight

Quantize = Callable[[str, Tensor, Precision], QuantizedTensor]
"""Called with a layer's name, its weight ``[N, K]``, and what it becomes."""


class Probe:
    """The loaded model, and what it says of some windows."""

    def __init__(self, prepared: Prepared, windows: Tensor, progress: Callable[[int, int], None] | None = None) -> None:
        """Load the model and run it once.

        Args:
            prepared: The model.
            windows: Token ids ``[W, T]``.
            progress: Called with bytes read and bytes in all.

        Raises:
            FewbitsError: If it does not fit into memory in fp32, is not one stack of blocks, or gives NaN or Inf.
        """
        self._windows = windows
        self.model = load_fp32(prepared, progress)
        self.prefix, self._blocks = stack_of(self.model)
        self._inputs: dict[int, Tensor] = {}
        self._as_tuple = False
        self._shared: list[list[str]] = []
        layers = [weight.module for weight in prepared.weights.values() if weight.module.startswith(self.prefix)]
        with self._watched(layers):
            self._log_p = self._log_probabilities()
        if not self._log_p.isfinite().all():
            raise FewbitsError(f"{prepared.source.path}: the model in fp32 predicts NaN or Inf; it cannot be searched")

    def groups(self) -> list[list[str]]:
        """Layers of blocks that have to stay together: those of one module that are given the same, as q, k and v."""
        return self._shared

    def block_of(self, layer: str) -> int:
        """The block that a layer is in."""
        return int(layer.removeprefix(self.prefix).split(".")[0])

    def kl(self, layers: Sequence[str], precision: Precision, quantize: Quantize) -> float:
        """What the predictions lose when these layers, and no others, are quantized: nats per token."""
        with torch.inference_mode(), self._quantized(layers, precision, quantize), self._from(layers):
            return kl_divergence(self._log_p, self._log_probabilities()).mean().item()

    def _log_probabilities(self) -> Tensor:
        """Of every second position of all windows at once, ``[P, V]``."""
        return torch.cat(list(log_probabilities(self.model, self._windows[None])))

    @contextmanager
    def _watched(self, layers: Sequence[str]) -> Iterator[None]:
        """Note what blocks are given and what layers share."""
        last: dict[str, tuple[Tensor, list[str]]] = {}

        def given_to_block(index: int, given: tuple[Any, ...], named: Mapping[str, Any]) -> None:
            self._inputs[index] = given[0] if given else named["hidden_states"]

        def given_to_layer(layer: str, x: Tensor) -> None:
            parent = layer.rpartition(".")[0]
            if parent not in last or last[parent][0] is not x:
                last[parent] = (x, [])
                self._shared.append(last[parent][1])
            last[parent][1].append(layer)

        def made(_: nn.Module, __: Any, output: Any) -> None:
            self._as_tuple = isinstance(output, tuple)

        hooks = [self._blocks[0].register_forward_hook(made)]
        for index, block in enumerate(self._blocks):
            hook: Any = lambda _, given, named, index=index: given_to_block(index, given, named)  # noqa: E731
            hooks.append(block.register_forward_pre_hook(hook, with_kwargs=True))
        for layer in layers:
            catch: Any = lambda _, given, layer=layer: given_to_layer(layer, given[0])  # noqa: E731
            hooks.append(self.model.get_submodule(layer).register_forward_pre_hook(catch))
        try:
            yield
        finally:
            for each in hooks:
                each.remove()

    @contextmanager
    def _quantized(self, layers: Sequence[str], precision: Precision, quantize: Quantize) -> Iterator[None]:
        """Let layers be quantized ones for a while."""
        before = {layer: self.model.get_submodule(layer) for layer in layers}
        try:
            for layer, module in before.items():
                weight = as_rows(module)
                made = as_loaded(quantize(layer, weight, precision), precision)
                activations = None if precision.activations is None else precision.activations.name
                self.model.set_submodule(layer, QuantLinear(made, module.bias, activations=activations))
            yield
        finally:
            for layer, module in before.items():
                self.model.set_submodule(layer, module)

    @contextmanager
    def _from(self, layers: Sequence[str]) -> Iterator[None]:
        """Let blocks before those of the layers do nothing, and the first of these be given what it was given."""
        first = min(self.block_of(layer) for layer in layers)
        known = self._inputs[first]

        def give(_: nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> Any:
            return ((known, *given[1:]), named) if given else (given, {**named, "hidden_states": known})

        def skip(*given: Any, **named: Any) -> Any:
            x = given[0] if given else named["hidden_states"]
            return (x,) if self._as_tuple else x

        hook = self._blocks[first].register_forward_pre_hook(give, with_kwargs=True)
        try:
            for block in list(self._blocks)[:first]:
                block.forward = skip
            yield
        finally:
            hook.remove()
            for block in list(self._blocks)[:first]:
                del block.forward


def load_fp32(prepared: Prepared, progress: Callable[[int, int], None] | None = None) -> transformers.PreTrainedModel:
    """The model in float32, as it is read from its source.

    Raises:
        FewbitsError: If it does not fit into memory.
    """
    source = prepared.source
    fp32 = PRECISIONS["fp32"]
    loading = Loading(auto_class_of(source.config), source, source.config, fp32, None, (), True, progress, None)
    return loading.run((), {}).eval().requires_grad_(False)


def as_rows(module: nn.Module) -> Tensor:
    """A layer's weight with input features last."""
    weight: Tensor = module.get_parameter("weight").detach()
    return weight.T if isinstance(module, Conv1D) else weight


def as_loaded(weight: QuantizedTensor, precision: Precision) -> QuantizedTensor:
    """What a loaded model makes of a stored weight: one of 8 bits is rotated if its layer gains by it."""
    if weight.rotation or not precision.gains_by_rotation or precision.weights.bits < 8:
        return weight
    rotated = replace(precision, rotated=True)
    return quantize_weight(
        weight.dequantize(), precision.weights.name,
        group_size=precision.group_size, scale_dtype=weight.scales.dtype, rotation=rotated.rotation(weight.shape[1]),
    )  # fmt: skip
