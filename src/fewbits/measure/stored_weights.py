"""In what a layer's weights are stored, whichever library made it."""

from __future__ import annotations

from torch import Tensor, nn

from fewbits.measure.memory import is_quantized, plain_parts
from fewbits.models.precision import TORCH_DTYPES


def format_and_bits(module: nn.Module) -> tuple[str, float]:
    """The format of a layer's weights, and bits per weight.

    Quantized layers of fewbits count their scales; of other libraries' the format is the name of their class, and what
    they keep outside of the weight is not seen.
    """
    if is_quantized(module):
        bits, count = module.quantized_bits()
        return getattr(module, "format", type(module).__name__), bits / count
    weights = [tensor for name, tensor in module.named_parameters(recurse=False) if "bias" not in name]
    count = sum(_numbers(module, weight) for weight in weights)
    bits = 8 * sum(part.nbytes for weight in weights for part in plain_parts(weight))
    return _format(module, weights[0]), bits / count if count else 0.0


def _format(module: nn.Module, weight: Tensor) -> str:
    if hasattr(weight, "__tensor_flatten__"):  # a wrapper, whose own dtype is that of what it computes in
        return type(weight).__name__
    return next((name for name, dtype in TORCH_DTYPES.items() if dtype == weight.dtype), type(module).__name__)


def _numbers(module: nn.Module, weight: Tensor) -> int:
    """How many numbers a weight stands for: packed codes are fewer bytes than numbers."""
    if weight.is_floating_point() or not isinstance(module, nn.Linear):
        return weight.numel()
    return module.in_features * module.out_features
