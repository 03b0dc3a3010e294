"""The bitsandbytes layout, in 8 bits: a Hugging Face folder that transformers reads with the bitsandbytes package.

Of a quantized layer X it stores

    X.weight         int8 [N, K], also of GPT-2's Conv1D, whose float weight is [K, N]
    X.SCB            float32 [N], the largest magnitude of each row: the scale is SCB / 127
    X.weight_format  uint8 [], 0: row after row

Stacked experts have one more dimension in front and the names ``X.gate_up_proj``, ``X.gate_up_proj_SCB``, …; other
readers do not know them. Checkpoints in 4 bits are read, see ``bitsandbytes_4bit``.

Source: bitsandbytes, ``bitsandbytes/nn/modules.py``, ``Linear8bitLt._save_to_state_dict``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fewbits.errors import FewbitsError
from fewbits.models.layouts.bitsandbytes_4bit import STATES, stored_4bit_weight
from fewbits.models.layouts.stored_weight import StoredWeight, check_dtype, check_shape, part_of
from fewbits.models.precision import PRECISIONS, Precision
from fewbits.models.source import Source, StoredTensor
from fewbits.tensors.quantized import LARGEST_CODE, QuantizedTensor

NAME = "bitsandbytes"
WRITES = ("int8",)
"""Precisions that this layout can say."""

SCALES: torch.dtype | None = torch.float32
"""The dtype of scales; None: that of what is not quantized."""

_ROW_AFTER_ROW = 0
_OUTLIERS = 6.0  # activations beyond it are multiplied in 16 bits by bitsandbytes; its own default


def quantization_config(precision: Precision, ignore: Sequence[str]) -> dict[str, Any]:
    """Return what ``config.json`` holds under ``quantization_config``.

    Args:
        precision: The precision of the quantized layers.
        ignore: Names of the linear and ``Conv1D`` layers that are not quantized.
    """
    assert precision.name in WRITES, precision
    return {
        "quant_method": NAME,
        "load_in_8bit": True,
        "load_in_4bit": False,
        "llm_int8_threshold": _OUTLIERS,
        "llm_int8_skip_modules": list(ignore),  # none, and not null, which stands for a choice of the reader
        "llm_int8_enable_fp32_cpu_offload": False,
        "llm_int8_has_fp16_weight": False,
        "bnb_4bit_compute_dtype": "float32",
        "bnb_4bit_quant_type": "fp4",
        "bnb_4bit_use_double_quant": False,
        "bnb_4bit_quant_storage": "uint8",
    }


def entries(
    name: str, shape: tuple[int, ...], precision: Precision, dtype: torch.dtype
) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """Names, dtypes and shapes of what a weight ``[..., K]`` is stored as, codes first; SCB is always float32."""
    absmax, layout = _beside(name)
    return {name: (torch.int8, shape), absmax: (torch.float32, shape[:-1]), layout: (torch.uint8, ())}


def store(name: str, weight: QuantizedTensor, precision: Precision) -> dict[str, Tensor]:
    """The tensors that a weight is stored as: what ``entries`` declares.

    SCB / 127 is the scale again: exactly if that has 16 bits, else within one unit in the last place.
    """
    absmax, layout = _beside(name)
    SCB = weight.scales.float().squeeze(-1) * LARGEST_CODE
    return {name: weight.codes, absmax: SCB, layout: torch.tensor(_ROW_AFTER_ROW, dtype=torch.uint8)}


def stored_weights(source: Source, config: dict[str, Any]) -> dict[str, StoredWeight]:
    """The quantized weights of a checkpoint, by the names that they have in a model.

    Args:
        source: The checkpoint.
        config: Its ``quantization_config``.

    Raises:
        FewbitsError: If a tensor that belongs to a weight is missing, has another shape or dtype, or says that codes
            lie in another order; or the configuration names neither 8 nor 4 bits.
    """
    in_8bit, in_4bit = (config.get(key) or config.get(f"_{key}") for key in ("load_in_8bit", "load_in_4bit"))
    if not in_8bit and not in_4bit:
        raise FewbitsError(
            f"{source.path}: bitsandbytes checkpoints have load_in_8bit or load_in_4bit in config.json, and this one "
            "has neither; load it with transformers, or convert the model that it was made from"
        )
    found = {}
    for tensor in source.tensors.values():
        for state in STATES if in_4bit else ():
            if tensor.name.endswith(state):
                name = tensor.name.removesuffix(state)
                found[name] = stored_4bit_weight(source, name, tensor.name)
        if in_4bit:
            continue
        if tensor.stored_as == "I8" or _beside(tensor.name)[0] in source.tensors:
            found[tensor.name] = _stored_weight(source, tensor)
    return found


def _stored_weight(source: Source, codes: StoredTensor) -> StoredWeight:
    path, tensors, name = source.path, source.tensors, codes.name
    absmax, layout = _beside(name)
    check_dtype(codes, {"I8": torch.int8}, path)
    SCB = part_of(name, absmax, tensors, path)
    check_dtype(SCB, {"F32": torch.float32}, path)
    check_shape(SCB, codes.shape[:-1], path=path)
    parts = [name, absmax]
    if layout in tensors:  # files of old versions lack it
        parts.append(layout)
        said = source.read(layout).flatten().tolist()
        if said != [_ROW_AFTER_ROW]:
            raise FewbitsError(
                f"{path}: {layout} is {said[0] if len(said) == 1 else said}, an order of codes for one kind of GPU; "
                f"only {_ROW_AFTER_ROW}, row after row, is read: save it again with bitsandbytes 0.45 or later"
            )

    def load(source: Source) -> QuantizedTensor:
        return QuantizedTensor(source.read(name), source.read(absmax)[..., None] / LARGEST_CODE)

    return StoredWeight(name, codes.shape, tuple(parts), PRECISIONS["int8"], SCB.stored_as, load)


def _beside(name: str) -> tuple[str, str]:
    """The names of what is stored beside a weight: SCB, and the format."""
    owner = f"{name.removesuffix('.weight')}." if name.endswith(".weight") else f"{name}_"
    return f"{owner}SCB", f"{owner}weight_format"
