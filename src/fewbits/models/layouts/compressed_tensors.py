"""The compressed-tensors layout: a Hugging Face folder that transformers and vLLM read.

Of a quantized layer X it stores, for 8-bit weights and activations (``int-quantized``):

    X.weight        int8  [N, K]
    X.weight_scale  float [N, 1], in the model's own 16- or 32-bit dtype

and ``config.json`` says so in ``quantization_config``. Activations are quantized at run time, so nothing is stored for
them. Biases, norms, embeddings and the layers under ``ignore`` are stored as in any other checkpoint.

Source: the compressed-tensors package, ``compressed_tensors/quantization/quant_args.py`` and ``quant_scheme.py``.
"""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from typing import Any

import torch

from fewbits.errors import FewbitsError
from fewbits.models.precision import PRECISIONS, Precision
from fewbits.models.source import StoredTensor

QUANT_METHOD = "compressed-tensors"
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
        precision: The precision of the quantized layers; int8 so far.
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
        "quant_method": QUANT_METHOD,
        "format": "int-quantized",
        "quantization_status": "compressed",
        "version": _WRITTEN_AS,
        "config_groups": {"group_0": group},
        "ignore": list(ignore),
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
    }


def stored_tensors(
    tensor: str, shape: tuple[int, ...], dtype: torch.dtype
) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """Names, dtypes and shapes that the weight ``tensor`` ``[N, K]`` is stored as, codes first."""
    return {tensor: (torch.int8, shape), scale_name(tensor): (dtype, (shape[0], 1))}


def scale_name(tensor: str) -> str:
    """The name of a weight's scales."""
    return f"{tensor}_scale"


def is_scale(tensor: str, names: Container[str]) -> bool:
    """Whether ``tensor`` holds the scales of another one among ``names``."""
    return tensor.endswith("_scale") and tensor.removesuffix("_scale") in names


def check_scales(tensors: Mapping[str, StoredTensor], path: object) -> None:
    """Check that the codes of a checkpoint have scales, one per channel: without them they stand for nothing.

    Raises:
        FewbitsError: If scales are missing or have another shape.
    """
    for name, codes in tensors.items():
        if codes.stored_as != "I8" or not name.endswith(".weight"):
            continue
        scales = tensors.get(scale_name(name))
        if scales is None:
            raise FewbitsError(f"{path}: {name} is int8, but {scale_name(name)} is missing; download it again")
        if scales.shape != (codes.shape[0], 1):
            raise FewbitsError(
                f"{path}: {scale_name(name)} has shape {list(scales.shape)}, the codes want {[codes.shape[0], 1]}; "
                "download it again"
            )


def stored_precision(config: dict[str, Any], path: object) -> Precision:
    """Return the precision that a checkpoint's ``quantization_config`` describes.

    Raises:
        FewbitsError: If it is another layout, or a scheme that fewbits does not read yet.
    """
    method = config.get("quant_method")
    if method != QUANT_METHOD:
        raise FewbitsError(f"{path}: quant_method {method!r} cannot be read; {QUANT_METHOD!r} can")
    group = _only_group(config)
    if _says(group.get("weights"), _WEIGHTS) and _says(group.get("input_activations"), _ACTIVATIONS):
        return PRECISIONS["int8"]
    raise FewbitsError(
        f"{path}: this {QUANT_METHOD} scheme ({config.get('format')!r}) cannot be read; int-quantized, 8-bit symmetric "
        "weights per channel with dynamic activations per token, can"
    )


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
