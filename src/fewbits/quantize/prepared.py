"""A model that is about to be converted: its structure, and where each stored tensor goes in it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Self

import torch
import transformers

from fewbits.models.architecture import auto_class_of, empty_model
from fewbits.models.manifest import ManifestRow, make_manifest
from fewbits.models.naming import Place, check_tensors
from fewbits.models.precision import Precision
from fewbits.models.quantizable import Weight, quantizable_weights
from fewbits.models.quantized_source import QuantizedSource
from fewbits.models.source import Source


@dataclass(frozen=True)
class Prepared:
    """A source and its model on the meta device.

    Attributes:
        source: Where tensors are read from.
        model: The model, without numbers.
        dtype: What is stored of tensors that are not quantized.
        shapes: Of the stored tensors; of quantized ones with input features last.
        places: Where each stored tensor goes in the model.
        weights: Of each stored tensor that is a quantizable weight, what it is.
    """

    source: Source
    model: transformers.PreTrainedModel
    dtype: torch.dtype
    shapes: Mapping[str, tuple[int, ...]]
    places: Mapping[str, Place]
    weights: Mapping[str, Weight]

    @classmethod
    def of(cls, source: Source, dtype: torch.dtype) -> Self:
        """Look at a source.

        Raises:
            FewbitsError: If its tensors are not those of the model that its configuration names.
        """
        model = empty_model(source.config, dtype, auto_class_of(source.config))
        shapes = {name: tensor.shape for name, tensor in source.tensors.items()}
        as_rows = source.weights if isinstance(source, QuantizedSource) else {}
        places = check_tensors(model, shapes, source.path, as_rows=as_rows)
        known = quantizable_weights(model)
        weights = {name: known[place.parameter] for name, place in places.items() if place.parameter in known}
        shapes |= {name: weights[name].rows(shape) for name, shape in as_rows.items() if name in weights}
        return cls(source, model, dtype, shapes, places, weights)

    def manifest(
        self, precision: Precision, keep: Sequence[str], mixed: Mapping[str, Precision] | None = None
    ) -> list[ManifestRow]:
        """What becomes of each tensor; see ``make_manifest``."""
        return make_manifest(self.model, self.shapes, self.places, precision, dtype=self.dtype, keep=keep, mixed=mixed)
