"""Folding: a change of one layer's output that the next layer's weights undo, made where weights are read.

    y = f(x) W1ᵀ ;  z = g(y) W2ᵀ        is        y' = f(x) (S W1)ᵀ ;  z = g(y') (W2 S⁻¹)ᵀ     where g keeps S

The model stays what it is, but for rounding; what changes is what rounding does to it. Tensors are changed one by one
when they are read, so that a conversion streams as ever, and whoever reads what it wrote sees an ordinary model.

Letters: K input features.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

import torch
import transformers
from torch import Tensor

from fewbits.errors import FewbitsError
from fewbits.models.architecture import auto_class_of, empty_model
from fewbits.models.naming import Place, check_tensors
from fewbits.models.quantized_source import DequantizedSource
from fewbits.models.source import Source, StoredTensor
from fewbits.models.stored_dtype import nominal_dtype

ALPHA = 0.5
"""How much of what is too large is moved from activations to weights: in equal parts."""

_MOST = 10  # powers of two that a channel is moved from the middle one: its gain stays well within 16 bits

Change = Callable[[Tensor], Tensor]
"""What is done to a tensor: float32, of the shape it has and keeps."""


@dataclass(frozen=True)
class Folds:
    """What is done to the tensors of a source.

    Attributes:
        changes: By the name of the tensor.
        copies: Tensors that the source does not have, and those that they are made of.
        reasons: What a manifest says of a tensor beside the usual.
        config: Fields of the configuration that become others.
        rotated: The layers that are given rotated activations then, as targets of compressed-tensors.
    """

    changes: Mapping[str, Change]
    copies: Mapping[str, str] = field(default_factory=dict)
    reasons: Mapping[str, str] = field(default_factory=dict)
    config: Mapping[str, object] = field(default_factory=dict)
    rotated: tuple[str, ...] = ()


class FoldedSource:
    """A source whose tensors are changed when they are read. See ``source.Source``.

    Attributes:
        folds: What is done to them.
        rotated: The layers that are given rotated activations; this and ``reasons`` count the folds below these too.
        reasons: What a manifest says of a tensor beside the usual.
    """

    def __init__(self, raw: Source, folds: Folds) -> None:
        self.path: Path = raw.path
        self.size: int = raw.size
        self.folds = folds
        self.rotated: tuple[str, ...] = (*getattr(raw, "rotated", ()), *folds.rotated)
        self.reasons: dict[str, str] = {**getattr(raw, "reasons", {}), **folds.reasons}
        self._raw = raw
        self._last: tuple[str, Tensor] | None = None

    @cached_property
    def config(self) -> transformers.PreTrainedConfig:
        """The configuration of the folded model."""
        config = copy.deepcopy(self._raw.config)
        for name, value in self.folds.config.items():
            setattr(config, name, value)
        return config

    @cached_property
    def tensors(self) -> dict[str, StoredTensor]:
        """The tensors of the source, then those that were none of their own."""
        tensors = dict(self._raw.tensors)
        return tensors | {name: replace(tensors[of], name=name) for name, of in self.folds.copies.items()}

    def read(self, name: str) -> Tensor:
        """One tensor; float32 if it is changed."""
        tensor = self._raw.read(self.folds.copies.get(name, name))
        change = self.folds.changes.get(name)
        return tensor if change is None else change(tensor.float())

    def read_rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows of a tensor; one that is changed is read whole for them."""
        if name not in self.folds.changes and name not in self.folds.copies:
            return self._raw.read_rows(name, start, stop)
        if self._last is None or self._last[0] != name:  # rows are asked for one piece after the other
            self._last = (name, self.read(name))
        return self._last[1][start:stop]

    def tokenizer(self) -> transformers.PreTrainedTokenizerBase:
        """The model's tokenizer."""
        return self._raw.tokenizer()

    def generation_config(self) -> transformers.GenerationConfig | None:
        """How the model wants to be sampled."""
        return self._raw.generation_config()


def foldable(source: Source, method: str) -> tuple[transformers.PreTrainedModel, dict[str, Place]]:
    """The model of a source, without memory, and where each stored tensor goes.

    Raises:
        FewbitsError: If it is quantized already, or is not what its configuration says.
    """
    if isinstance(source, DequantizedSource):
        raise FewbitsError(
            f"method={method!r}: {source.path} is quantized already, and what was rounded cannot be folded well; "
            "convert the model that it was made from"
        )
    model = empty_model(source.config, nominal_dtype(source), auto_class_of(source.config))
    return model, check_tensors(model, {name: each.shape for name, each in source.tensors.items()}, source.path)


def together(*changes: Change) -> Change:
    """One change after the other."""

    def change(tensor: Tensor) -> Tensor:
        for each in changes:
            tensor = each(tensor)
        return tensor

    return change


def scales_of(activations: Tensor, weights: Tensor) -> Tensor:
    """What to divide the channels of activations by, and to multiply the weights' with, ``[K]``.

    A dead channel, whose activations or weights were all 0, gets 1. The middle one of the others gets 1 too: a factor
    common to all would change nothing.

    Args:
        activations: The largest magnitude of each channel ``[K]``.
        weights: The same of the weights that read it ``[K]``.
    """
    dead = (activations == 0) | (weights == 0)
    powers = ALPHA * activations.log2() - (1 - ALPHA) * weights.log2()
    if dead.all():
        return torch.ones_like(powers)
    powers = (powers - powers[~dead].median()).clamp(-_MOST, _MOST)
    return torch.exp2(powers.masked_fill(dead, 0.0))
