"""A checkpoint that is quantized already, seen as its weights: one name each, whatever a layout stores for it."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedTokenizerBase

from fewbits.errors import FewbitsError
from fewbits.models.layouts import bitsandbytes, compressed_tensors
from fewbits.models.layouts.stored_weight import SCALE_DTYPES, StoredWeight
from fewbits.models.precision import Precision
from fewbits.models.source import Source, StoredTensor
from fewbits.tensors.quantized import QuantizedTensor

FOLDER_LAYOUTS: dict[str, ModuleType] = {module.NAME: module for module in (compressed_tensors, bitsandbytes)}
"""Layouts of folders by ``quant_method``. Each is a module with the functions that ``compressed_tensors`` has."""

_READ = FOLDER_LAYOUTS | {compressed_tensors.ROTATED: compressed_tensors}


class DequantizedSource:
    """A source whose quantized weights are read as the numbers that they stand for. See ``source.Source``."""

    def __init__(self, stored: Source, found: Mapping[str, StoredWeight]) -> None:
        self._stored, self._found = stored, found
        self.path: Path = stored.path
        self.size: int = stored.size
        self._last: tuple[str, Tensor] | None = None

    @property
    def config(self) -> PreTrainedConfig:
        """The model's configuration."""
        return self._stored.config

    @cached_property
    def tensors(self) -> dict[str, StoredTensor]:
        """Weights and other tensors; a weight's bytes are those of all that is stored for it."""
        stored = self._stored.tensors
        weights = {part: weight for weight in self._found.values() for part in weight.parts}
        tensors: dict[str, StoredTensor] = {}
        for name, tensor in stored.items():
            weight = weights.get(name)
            if weight is None:
                tensors[name] = tensor
            elif weight.name not in tensors:
                nbytes = sum(stored[part].nbytes for part in weight.parts)
                tensors[weight.name] = StoredTensor(weight.name, weight.shape, self._stored_as(weight), nbytes)
        return tensors

    def read(self, name: str) -> Tensor:
        """One tensor; a quantized weight as the numbers that it stands for, input features last."""
        return self._found[name].values(self._stored) if name in self._found else self._stored.read(name)

    def read_rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows of a tensor; of a quantized weight too, which is read whole for them."""
        if name not in self._found:
            return self._stored.read_rows(name, start, stop)
        if self._last is None or self._last[0] != name:  # rows are asked for one piece after the other
            self._last = (name, self.read(name))
        return self._last[1][start:stop]

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The model's tokenizer."""
        return self._stored.tokenizer()

    def generation_config(self) -> GenerationConfig | None:
        """How the model wants to be sampled."""
        return self._stored.generation_config()

    def _stored_as(self, weight: StoredWeight) -> str:
        return weight.scale_dtype


class QuantizedSource(DequantizedSource):
    """A source whose quantized weights can be read as codes and scales. See ``source.Source``.

    Attributes:
        precision: What its layers are quantized to; where they differ, what most of the weights are.
        layout: The name of its layout.
        weights: The weights of this precision by name, and their shapes with input features last. Weights of another
            are read as the numbers that they stand for.
        scale_dtype: The widest dtype of their scales.
    """

    def __init__(self, stored: Source, layout: ModuleType, found: Mapping[str, StoredWeight]) -> None:
        super().__init__(stored, found)
        self.layout: str = layout.NAME
        self.precision = _most(found)
        same = [weight for weight in found.values() if weight.precision == self.precision]
        self.weights = {weight.name: weight.shape for weight in same}
        dtypes = {SCALE_DTYPES[weight.scale_dtype] for weight in same}
        self.scale_dtype = dtypes.pop() if len(dtypes) == 1 else torch.float32
        self._last_codes: tuple[str, QuantizedTensor] | None = None

    def read_rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows of a tensor; of a quantized weight too, whose codes are read whole for them."""
        if name not in self.weights:
            return super().read_rows(name, start, stop)
        if self._last_codes is None or self._last_codes[0] != name:  # rows are asked for one piece after the other
            self._last_codes = (name, self.read_quantized(name))
        weight = self._last_codes[1]
        return replace(weight, codes=weight.codes[start:stop], scales=weight.scales[start:stop]).dequantize()

    def read_quantized(self, name: str) -> QuantizedTensor:
        """One quantized weight as codes and scales."""
        weight = self._found[name].load(self._stored)
        assert isinstance(weight, QuantizedTensor), name
        return weight

    def holds(self, name: str, precision: Precision) -> bool:
        """Whether a tensor can be read as codes and scales of this very precision."""
        return name in self._found and self._found[name].precision == precision

    def _stored_as(self, weight: StoredWeight) -> str:
        return self.precision.weights.name if weight.name in self.weights else weight.scale_dtype


def as_weights(source: Source) -> Source:
    """The source itself if its tensors are plain values, else a ``QuantizedSource`` over it.

    A checkpoint whose weights are all of schemes that no precision of fewbits has (with zero points, or scales for
    blocks) is read as the numbers that they stand for, a ``DequantizedSource``; a warning says so.

    Raises:
        FewbitsError: If it is quantized in a way that fewbits does not read.
    """
    config = getattr(source.config, "quantization_config", None)
    if config is None or isinstance(source, DequantizedSource):
        return source
    config = dict(config if isinstance(config, dict) else config.to_dict())
    method = config.get("quant_method")
    layout = _READ.get(str(getattr(method, "value", method)))
    if layout is None:
        can = ", ".join(repr(name) for name in FOLDER_LAYOUTS)
        raise FewbitsError(f"{source.path}: quant_method {method!r} cannot be read; {can} can")
    found: dict[str, StoredWeight] = layout.stored_weights(source, config)
    if not found:
        raise FewbitsError(
            f"{source.path}: config.json says {layout.NAME}, but no tensor is quantized; take "
            "quantization_config out of it"
        )
    if all(weight.precision is None for weight in found.values()):
        _tell_what_is_dequantized(source, list(found))
        return DequantizedSource(source, found)
    opened = QuantizedSource(source, layout, found)
    _tell_what_is_dequantized(source, [name for name in found if name not in opened.weights])
    return opened


def _most(found: Mapping[str, StoredWeight]) -> Precision:
    """The precision that most of the weights have."""
    counts: dict[Precision, int] = {}
    for weight in found.values():
        if weight.precision is not None:
            counts[weight.precision] = counts.get(weight.precision, 0) + torch.Size(weight.shape).numel()
    return max(counts, key=lambda precision: counts[precision])


def _tell_what_is_dequantized(source: Source, names: list[str]) -> None:
    if names:
        warnings.warn(
            f"{source.path}: {len(names)} weights, such as {names[0]}, are of another scheme than the precisions of "
            "fewbits and are read as the 16- or 32-bit numbers that they stand for",
            stacklevel=4,
        )
