"""A checkpoint that is quantized already, seen as its weights: one name each, whatever a layout stores for it."""

from __future__ import annotations

import math
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
from fewbits.tensors.quantized import QuantizedTensor, has_power_scales

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
        precisions: What each weight is, by name.
        layout: The name of its layout.
        weights: The shapes of these weights, input features last. Those of a scheme that no precision has are read as
            the numbers that they stand for.
        scale_dtype: The widest dtype of their scales.
    """

    def __init__(self, stored: Source, layout: ModuleType, found: Mapping[str, StoredWeight]) -> None:
        super().__init__(stored, found)
        self.layout: str = layout.NAME
        self.precisions = {name: each.precision for name, each in found.items() if each.precision is not None}
        self.weights = {name: found[name].shape for name in self.precisions}
        self._counts = _counts(self.precisions, self.weights)
        self.precision = max(self._counts, key=lambda precision: self._counts[precision])
        any_dtype = {name for name, each in self.precisions.items() if has_power_scales(each.weights.name)}
        dtypes = {SCALE_DTYPES[found[name].scale_dtype] for name in self.precisions.keys() - any_dtype or any_dtype}
        self.scale_dtype = dtypes.pop() if len(dtypes) == 1 else torch.float32
        self._last_codes: tuple[str, QuantizedTensor] | None = None

    @property
    def precision_name(self) -> str:
        """What listings say of it: the names of its precisions, that of most weights first."""
        most_first = sorted(self._counts, key=lambda precision: -self._counts[precision])
        return "+".join(dict.fromkeys(precision.name for precision in most_first))

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
        return self.precisions.get(name) == precision

    def _stored_as(self, weight: StoredWeight) -> str:
        precision = self.precisions.get(weight.name)
        return weight.scale_dtype if precision is None else precision.weights.name


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


def _counts(precisions: Mapping[str, Precision], shapes: Mapping[str, tuple[int, ...]]) -> dict[Precision, int]:
    """How many weights each precision has."""
    counts: dict[Precision, int] = {}
    for name, precision in precisions.items():
        counts[precision] = counts.get(precision, 0) + math.prod(shapes[name])
    return counts


def _tell_what_is_dequantized(source: Source, names: list[str]) -> None:
    if names:
        warnings.warn(
            f"{source.path}: {len(names)} weights, such as {names[0]}, are of another scheme than the precisions of "
            "fewbits and are read as the 16- or 32-bit numbers that they stand for",
            stacklevel=4,
        )
