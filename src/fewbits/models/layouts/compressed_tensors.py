"""The compressed-tensors layout: a Hugging Face folder that transformers and vLLM read.

Of a quantized layer X it stores, for 8-bit weights and activations (``int-quantized``):

    X.weight        int8  [N, K]
    X.weight_scale  float [N, 1], in the model's own 16- or 32-bit dtype

and ``config.json`` says so in ``quantization_config``. Activations are quantized at run time, so nothing is stored for
them. Biases, norms, embeddings and the layers under ``ignore`` are stored as in any other checkpoint.

Source: the compressed-tensors package, ``compressed_tensors/quantization/quant_args.py`` and ``quant_scheme.py``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fewbits.errors import FewbitsError
from fewbits.models.precision import PRECISIONS, Precision
from fewbits.models.source import Source, StoredTensor
from fewbits.tensors.quantized import QuantizedTensor

NAME = "compressed-tensors"
WRITES = ("int8",)
"""Precisions that this layout can say."""

_WRITTEN_AS = "0.15.0"  # the first version of the package that transformers 5 accepts

# Keys that readers may leave out, with what leaving them out means.
_DEFAULTS: dict[str, Any] = {"symmetric": True, "dynamic": False, "group_size": None}
_WEIGHTS = {
    "num_bits": 8,
    "type": "int",
    "symmetric": True,
    "strategy": "channel",
    "dynamic": False,
    "group_size": None,
}
_ACTIVATIONS = {**_WEIGHTS, "strategy": "token", "dynamic": True}


def quantization_config(precision: Precision, ignore: Sequence[str]) -> dict[str, Any]:
    """Return what ``config.json`` holds under ``quantization_config``.

    Args:
        precision: The precision of the quantized layers.
        ignore: Names of the linear layers that are not quantized.
    """
    assert precision.name == "int8", precision
    group = {
        "targets": ["Linear"],
        "weights": dict(_WEIGHTS),
        "input_activations": dict(_ACTIVATIONS),
        "output_activations": None,
    }
    return {
        "quant_method": NAME,
        "format": "int-quantized",
        "quantization_status": "compressed",
        "version": _WRITTEN_AS,
        "config_groups": {"group_0": group},
        "ignore": list(ignore),
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
    }


def entries(
    name: str, shape: tuple[int, ...], precision: Precision, dtype: torch.dtype
) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """Names, dtypes and shapes of what a weight ``[..., K]`` is stored as, codes first.

    Args:
        name: The weight's full name.
        shape: Its shape, input features last.
        precision: Its precision.
        dtype: The dtype of its scales.
    """
    return {name: (torch.int8, shape), _scale_name(name): (dtype, (*shape[:-1], 1))}


def store(name: str, weight: QuantizedTensor) -> dict[str, Tensor]:
    """The tensors that a weight is stored as: what ``entries`` declares."""
    return {name: weight.codes, _scale_name(name): weight.scales}


def precision_of(config: dict[str, Any], path: object) -> Precision:
    """Return the precision that a checkpoint's ``quantization_config`` describes.

    Raises:
        FewbitsError: If it is a scheme that fewbits does not read yet.
    """
    group = _only_group(config)
    if _says(group.get("weights"), _WEIGHTS) and _says(group.get("input_activations"), _ACTIVATIONS):
        return PRECISIONS["int8"]
    raise FewbitsError(
        f"{path}: this {NAME} scheme ({config.get('format')!r}) cannot be read; int-quantized, 8-bit symmetric "
        "weights per channel with dynamic activations per token, can"
    )


def weights(tensors: Mapping[str, StoredTensor], precision: Precision, path: object) -> dict[str, tuple[int, ...]]:
    """The quantized weights of a checkpoint and their shapes, input features last.

    Raises:
        FewbitsError: If scales are missing or have another shape: without them codes stand for nothing.
    """
    found = {}
    for name, codes in tensors.items():
        scales = tensors.get(_scale_name(name))
        if codes.stored_as != "I8" and scales is None:
            continue
        if scales is None:
            raise FewbitsError(f"{path}: {name} is int8, but {_scale_name(name)} is missing; download it again")
        if scales.shape != (*codes.shape[:-1], 1):
            raise FewbitsError(
                f"{path}: {scales.name} has shape {list(scales.shape)}, the codes want {[*codes.shape[:-1], 1]}; "
                "download it again"
            )
        found[name] = codes.shape
    return found


def companions(name: str) -> list[str]:
    """The names of what is stored for a weight, as far as they may be there."""
    return [name, _scale_name(name)]


def read(source: Source, name: str, precision: Precision) -> QuantizedTensor:
    """One weight as codes and scales."""
    return QuantizedTensor(source.read(name), source.read(_scale_name(name)), precision.weights.name)


def _scale_name(name: str) -> str:
    return f"{name}_scale"


def _only_group(config: dict[str, Any]) -> dict[str, Any]:
    """The scheme if it is the only one and nothing else changes what the tensors mean, else nothing."""
    match config:
        case {"config_groups": {**groups}, "format": "int-quantized"} if len(groups) == 1:
            group = next(iter(groups.values()))
            sparse = (config.get("sparsity_config") or {}).get("format", "dense") != "dense"
            beside = sparse or any(config.get(key) for key in ("kv_cache_scheme", "transform_config"))
            return group if isinstance(group, dict) and not beside and not group.get("output_activations") else {}
    return {}


def _says(found: Any, wanted: dict[str, Any]) -> bool:
    return isinstance(found, dict) and all(found.get(key, _DEFAULTS.get(key)) == value for key, value in wanted.items())
