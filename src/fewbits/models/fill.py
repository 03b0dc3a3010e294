"""Check that a checkpoint is of a model, and fill the empty model with its tensors as they come, in any order."""

from __future__ import annotations

import warnings
from collections.abc import Mapping

import torch
import transformers
from torch import Tensor, nn

from fewbits.errors import FewbitsError
from fewbits.models.linear import QuantHead, QuantLinear
from fewbits.models.source import Source
from fewbits.tensors.quantized import QuantizedTensor, quantize_per_channel


def check_tensors(model: transformers.PreTrainedModel, shapes: Mapping[str, tuple[int, ...]], path: object) -> None:
    """Check that a checkpoint has every tensor of a model, in the model's shape.

    Args:
        model: The model; it may be on the meta device. A tensor that its configuration ties to another may be absent.
        shapes: Shape of each stored tensor by name; those that the model does not have are not looked at.
        path: The checkpoint, for the message.

    Raises:
        FewbitsError: If one is missing or has another shape.
    """
    wanted = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    missing = [name for name in wanted if name not in shapes and name not in model.all_tied_weights_keys]
    if missing:
        raise FewbitsError(
            f"{path}: {len(missing)} tensors of the model are not in the checkpoint, such as {missing[0]}; "
            "download it again"
        )
    for name, shape in wanted.items():
        if shapes.get(name, shape) != shape:
            raise FewbitsError(
                f"{path}: {name} has shape {list(shapes[name])}, the configuration wants {list(shape)}; "
                "config.json and the weights are not of the same model"
            )


class Filler:
    """Puts tensors of a checked checkpoint where they belong in an empty model, and knows which have no place."""

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
        try:
            layer = self.model.get_submodule(layer_name)
        except AttributeError:
            self.unexpected.append(name)
            return
        if not isinstance(layer, nn.Linear):
            raise FewbitsError(
                f"{self.source.path}: {name} is quantized, and {type(layer).__name__} is no linear layer; that is not "
                "read yet"
            )
        bias: Tensor | None = layer.bias
        if bias is not None and bias.is_meta:  # its tensor comes later in the file
            bias = torch.zeros(layer.out_features)
        kind = QuantHead if layer is self.model.get_output_embeddings() else QuantLinear
        self.model.set_submodule(layer_name, kind(weight, bias))

    def finish(self) -> transformers.PreTrainedModel:
        """Warn of tensors without a place; return the model ready for inference."""
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
