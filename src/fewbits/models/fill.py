"""Fill an empty model with tensors as they come, in any order, and say what was missing."""

from __future__ import annotations

import warnings

import torch
import transformers
from torch import Tensor, nn

from fewbits.errors import FewbitsError
from fewbits.models.linear import QuantHead, QuantLinear
from fewbits.models.source import Source
from fewbits.tensors.quantized import QuantizedTensor, quantize_per_channel


class Filler:
    """Puts tensors where they belong in an empty model, and knows at the end what was missing."""

    def __init__(self, model: transformers.PreTrainedModel, source: Source) -> None:
        self.model = model
        self.source = source
        self.unexpected: list[str] = []

    def fill(self, name: str, tensor: Tensor) -> None:
        """Set a parameter or buffer."""
        owner_name, _, leaf = name.rpartition(".")
        try:
            owner = self.model.get_submodule(owner_name)
            there = getattr(owner, leaf)
        except AttributeError:
            self.unexpected.append(name)
            return
        self._check_shape(name, tuple(there.shape), tuple(tensor.shape))
        if leaf in owner._parameters:
            setattr(owner, leaf, nn.Parameter(tensor, requires_grad=False))
        else:
            setattr(owner, leaf, tensor.to(there.dtype))

    def quantize(self, name: str, weight: Tensor, scale_dtype: torch.dtype) -> None:
        """Replace a linear layer by one whose weight is quantized here."""
        try:
            self.place(name, quantize_per_channel(weight, scale_dtype=scale_dtype))
        except FewbitsError as error:
            raise FewbitsError(f"{self.source.path}: {name}: {error}") from None

    def place(self, name: str, weight: QuantizedTensor) -> None:
        """Replace a linear layer by one with this quantized weight."""
        layer_name = name.rpartition(".")[0]
        layer = self.model.get_submodule(layer_name)
        self._check_shape(name, (layer.out_features, layer.in_features), tuple(weight.codes.shape))
        bias = layer.bias
        if bias is not None and bias.is_meta:  # its tensor comes later in the file
            bias = torch.zeros(layer.out_features)
        kind = QuantHead if layer is self.model.get_output_embeddings() else QuantLinear
        self.model.set_submodule(layer_name, kind(weight, bias))

    def finish(self) -> transformers.PreTrainedModel:
        """Check that nothing is missing; return the model ready for inference."""
        missing = [name for name, tensor in self.model.state_dict().items() if tensor.is_meta]
        if missing:
            raise FewbitsError(
                f"{self.source.path}: {len(missing)} tensors of the model are not in the checkpoint, such as "
                f"{missing[0]}; download it again"
            )
        if self.unexpected:
            warnings.warn(
                f"{self.source.path}: {len(self.unexpected)} tensors have no place in {type(self.model).__name__} and "
                f"were left out, such as {self.unexpected[0]}",
                stacklevel=4,
            )
        generation_config = self.source.generation_config()
        if generation_config is not None:
            self.model.generation_config = generation_config
        return self.model.eval().requires_grad_(False)

    def _check_shape(self, name: str, wanted: tuple[int, ...], found: tuple[int, ...]) -> None:
        if wanted != found:
            raise FewbitsError(
                f"{self.source.path}: {name} has shape {list(found)}, the configuration wants {list(wanted)}; "
                "config.json and the weights are not of the same model"
            )
