"""One quantized weight of a checkpoint, whatever tensors a layout keeps it in."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from fewbits.errors import FewbitsError
from fewbits.models.precision import Precision
from fewbits.models.source import Source, StoredTensor
from fewbits.tensors.quantized import QuantizedTensor

SCALE_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
"""The dtypes that scales may have, by the names of safetensors."""

_CODES = {"I8": "int8", "I32": "codes in 32-bit words", "F8_E4M3": "float8_e4m3fn"}


@dataclass(frozen=True)
class StoredWeight:
    """A weight, and how to read it.

    Attributes:
        name: The name that it has in a model, ``X.weight``; of stacked experts ``X.gate_up_proj``.
        shape: Its shape with input features last, ``[..., N, K]``.
        parts: Names of the tensors that it is stored in; the first is in the place of the weight.
        precision: The precision that its codes and scales are of; None: only its values can be taken.
        scale_dtype: The name that safetensors has for the dtype of its scales.
        load: Reads it: codes and scales if it has a precision, else its values in the dtype of the scales.
    """

    name: str
    shape: tuple[int, ...]
    parts: tuple[str, ...]
    precision: Precision | None
    scale_dtype: str
    load: Callable[[Source], QuantizedTensor | Tensor]

    def values(self, source: Source) -> Tensor:
        """The numbers that it stands for."""
        loaded = self.load(source)
        return loaded.dequantize() if isinstance(loaded, QuantizedTensor) else loaded


def part_of(name: str, part: str, tensors: Mapping[str, StoredTensor], path: object) -> StoredTensor:
    """A tensor without which a weight cannot be read.

    Args:
        name: The tensor that holds the weight's codes, for the message.
        part: The name of the one that is looked for.
        tensors: All tensors of the checkpoint.
        path: The checkpoint.

    Raises:
        FewbitsError: If it is missing.
    """
    if part not in tensors:
        codes = _CODES.get(tensors[name].stored_as, tensors[name].stored_as)
        raise FewbitsError(f"{path}: {name} is {codes}, but {part} is missing; download it again")
    return tensors[part]


def check_dtype(tensor: StoredTensor, allowed: Mapping[str, object], path: object) -> None:
    """Check that a part of a weight is stored in one of these dtypes.

    Raises:
        FewbitsError: If it is not.
    """
    if tensor.stored_as not in allowed:
        raise FewbitsError(
            f"{path}: {tensor.name} is stored as {tensor.stored_as}, the layout wants {' or '.join(allowed)}; "
            "download it again"
        )


def check_shape(tensor: StoredTensor, *wanted: tuple[int, ...], path: object) -> None:
    """Check that a part of a weight has one of these shapes.

    Raises:
        FewbitsError: If it has not.
    """
    if tensor.shape not in wanted:
        raise FewbitsError(
            f"{path}: {tensor.name} has shape {list(tensor.shape)}, the codes want {list(wanted[0])}; download it again"
        )
