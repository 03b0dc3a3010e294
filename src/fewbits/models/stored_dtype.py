"""In which precision and which dtype a checkpoint is stored."""

from __future__ import annotations

import torch

from fewbits.models.precision import TORCH_DTYPES
from fewbits.models.quantized_source import QuantizedSource, as_weights
from fewbits.models.source import Source


def stored_name(source: Source) -> str | None:
    """The name of what a source is quantized in, of several joined by +; None if its tensors are plain values."""
    weights = as_weights(source) if not isinstance(source, QuantizedSource) else source
    return weights.precision_name if isinstance(weights, QuantizedSource) else None


def nominal_dtype(source: Source) -> torch.dtype:
    """The dtype of what is not quantized: the model's own, or bfloat16 if it names none of 16 or 32 bits."""
    dtype = source.config.dtype
    return dtype if dtype in TORCH_DTYPES.values() else torch.bfloat16


def stored_dtype(source: Source) -> torch.dtype:
    """The dtype in which a quantized checkpoint stores what is not quantized: its widest float."""
    dtypes = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
    found = {dtypes[tensor.stored_as] for tensor in source.tensors.values() if tensor.stored_as in dtypes}
    return torch.float32 if len(found) > 1 else found.pop() if found else nominal_dtype(source)
