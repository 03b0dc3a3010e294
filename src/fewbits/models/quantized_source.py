"""A checkpoint that is quantized already, seen as its weights: one name each, whatever a layout stores for it."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from types import ModuleType

import torch
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedTokenizerBase

from fewbits.errors import FewbitsError
from fewbits.models.layouts import compressed_tensors
from fewbits.models.precision import Precision
from fewbits.models.source import Source, StoredTensor
from fewbits.tensors.quantized import QuantizedTensor

FOLDER_LAYOUTS: dict[str, ModuleType] = {compressed_tensors.NAME: compressed_tensors}
"""Layouts of folders by ``quant_method``. Each is a module with the functions that ``compressed_tensors`` has."""


class QuantizedSource:
    """A source whose quantized weights can be read as codes and scales. See ``source.Source``.

    Attributes:
        precision: What its layers are quantized to.
        layout: The name of its layout.
        weights: The quantized weights by name, and their shapes with input features last.
    """

    def __init__(self, stored: Source, layout: ModuleType, precision: Precision) -> None:
        self._stored, self._layout = stored, layout
        self.precision, self.layout = precision, layout.NAME
        self.weights: dict[str, tuple[int, ...]] = layout.weights(stored.tensors, precision, stored.path)
        self.path: Path = stored.path
        self.size: int = stored.size
        self._last: tuple[str, QuantizedTensor] | None = None

    @property
    def config(self) -> PreTrainedConfig:
        """The model's configuration."""
        return self._stored.config

    @cached_property
    def tensors(self) -> dict[str, StoredTensor]:
        """Weights and other tensors; a weight's bytes are those of all that is stored for it."""
        stored = self._stored.tensors
        parts = {part: name for name in self.weights for part in self._layout.companions(name)}
        found: dict[str, StoredTensor] = {}
        for name, tensor in stored.items():
            weight = parts.get(name)
            if weight is None:
                found[name] = tensor
            elif weight not in found:
                nbytes = sum(stored[part].nbytes for part in self._layout.companions(weight) if part in stored)
                found[weight] = StoredTensor(weight, self.weights[weight], self.precision.weights.name, nbytes)
        return found

    def read(self, name: str) -> torch.Tensor:
        """One tensor; a quantized weight as the float32 values that it stands for, input features last."""
        return self.read_quantized(name).dequantize() if name in self.weights else self._stored.read(name)

    def read_rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Rows of a tensor; of a quantized weight too, which is read whole for them."""
        if name not in self.weights:
            return self._stored.read_rows(name, start, stop)
        if self._last is None or self._last[0] != name:  # rows are asked for one piece after the other
            self._last = (name, self.read_quantized(name))
        weight = self._last[1]
        return QuantizedTensor(weight.codes[start:stop], weight.scales[start:stop], weight.format).dequantize()

    def read_quantized(self, name: str) -> QuantizedTensor:
        """One quantized weight as codes and scales."""
        weight: QuantizedTensor = self._layout.read(self._stored, name, self.precision)
        return weight

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The model's tokenizer."""
        return self._stored.tokenizer()

    def generation_config(self) -> GenerationConfig | None:
        """How the model wants to be sampled."""
        return self._stored.generation_config()


def as_weights(source: Source) -> Source:
    """The source itself if its tensors are plain values, else a ``QuantizedSource`` over it.

    Raises:
        FewbitsError: If it is quantized in a way that fewbits does not read.
    """
    config = getattr(source.config, "quantization_config", None)
    if config is None:
        return source
    config = dict(config if isinstance(config, dict) else config.to_dict())
    method = config.get("quant_method")
    layout = FOLDER_LAYOUTS.get(str(getattr(method, "value", method)))
    if layout is None:
        can = ", ".join(repr(name) for name in FOLDER_LAYOUTS)
        raise FewbitsError(f"{source.path}: quant_method {method!r} cannot be read; {can} can")
    return QuantizedSource(source, layout, layout.precision_of(config, source.path))
