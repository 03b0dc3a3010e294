"""The compressed-tensors layout: a Hugging Face folder that transformers and vLLM read.

Of a quantized layer X with weights ``[N, K]`` and G scales per channel it stores

    int8 (``int-quantized``)                    X.weight         int8 [N, K]
    fp8 (``float-quantized``)                   X.weight         float8_e4m3fn [N, K]
    int8-weight and int4 (``pack-quantized``)   X.weight_packed  int32 [N, words], see ``packed_words``
                                                X.weight_shape   int64 [2]: N and K
    all of these                                X.weight_scale   float [N, G], in the model's own 16- or 32-bit dtype
    mxfp4 (``mxfp4-pack-quantized``)            X.weight_packed  uint8 [N, K/2], the first of two codes in the low half
                                                X.weight_scale   uint8 [N, K/32], exponents of two with a bias of 127

and ``config.json`` says so in ``quantization_config``. Activations are quantized at run time, so nothing is stored for
them. Biases, norms, embeddings and the layers under ``ignore`` are stored as in any other checkpoint. Stacked experts
have one more dimension in front and no ``.weight`` in their names; other readers do not know them.

Layers may have several of these precisions (``mixed-precision``): then each group names its layers, and its format,
without which vLLM would leave activations as they are.

Rotated weights (``kernels.rotation``) are stored alike, under a ``quant_method`` of their own. Where rotations are
folded into neighbouring weights, all readers compute the same; ``rotation.folded`` names the layers, so that fewbits
does not rotate again what these are given.

Source: the compressed-tensors package, ``compressed_tensors/quantization/`` and ``compressed_tensors/compressors/``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fewbits.models.layouts.compressed_schemes import FOLDED, ROTATION, schemes_of
from fewbits.models.layouts.compressed_weight import CODES, PACKED, SCALE, SHAPE, ZERO_POINT, stored_weight
from fewbits.models.layouts.exponents import exponents_of
from fewbits.models.layouts.packed_words import pack_words, words_in
from fewbits.models.layouts.stored_weight import StoredWeight
from fewbits.models.precision import Precision
from fewbits.models.source import Source
from fewbits.tensors.quantized import CODE_DTYPES, QuantizedTensor

NAME = "compressed-tensors"
WRITES = ("int8", "int8-weight", "int4", "mxfp4", "fp8")
"""Precisions that this layout can say."""

ROTATED = "fewbits"
"""The ``quant_method`` of rotated weights: readers that do not rotate activations must refuse them."""

SCALES: torch.dtype | None = None
"""The dtype of scales; None: that of what is not quantized."""

_WRITTEN_AS = "0.15.0"  # the first version of the package that transformers 5 accepts
_FORMATS = {
    "int8": "int-quantized",
    "int8-weight": "pack-quantized",
    "int4": "pack-quantized",
    "mxfp4": "mxfp4-pack-quantized",
    "fp8": "float-quantized",
}
_MIXED = "mixed-precision"


def quantization_config(precision: Precision, ignore: Sequence[str]) -> dict[str, Any]:
    """Return what ``config.json`` holds under ``quantization_config``.

    Args:
        precision: The precision of the quantized layers.
        ignore: Names of the linear layers that are not quantized.
    """
    return _config(_FORMATS[precision.name], [_group(precision, ["Linear"])], ignore, rotated=precision.rotated)


def mixed_config(layers: Mapping[Precision, Sequence[str]], ignore: Sequence[str]) -> dict[str, Any]:
    """The same for layers of several precisions; each group has the names of its layers as targets.

    Args:
        layers: Names of the layers of each precision.
        ignore: Names of the linear layers that are not quantized.
    """
    groups = [_group(precision, names) | {"format": _FORMATS[precision.name]} for precision, names in layers.items()]
    config = _config(_MIXED, groups, ignore, rotated=any(precision.rotated for precision in layers))
    return with_folded(config, [name for each, names in layers.items() if each.given_rotated for name in names])


def with_folded(config: dict[str, Any], targets: Sequence[str]) -> dict[str, Any]:
    """The same for layers of which some are given what the weights before them have rotated.

    Args:
        config: What ``quantization_config`` or ``mixed_config`` returned.
        targets: Their names, or expressions that match them; empty: there are none.
    """
    return config | {"rotation": config.get("rotation", {}) | {FOLDED: list(targets)}} if targets else config


def _group(precision: Precision, targets: Sequence[str]) -> dict[str, Any]:
    weights = {
        "num_bits": precision.weights.bits,
        "type": "float" if precision.name in ("fp8", "mxfp4") else "int",
        "symmetric": True,
        "strategy": "channel" if precision.group_size is None else "group",
        "dynamic": False,
        "group_size": precision.group_size,
    }
    if precision.name == "mxfp4":
        weights["scale_dtype"] = "torch.uint8"
    tokens = {**weights, "strategy": "token", "dynamic": True}
    return {
        "targets": list(targets),
        "weights": weights,
        "input_activations": tokens if precision.stored_activations else None,
        "output_activations": None,
    }


def _config(
    format_name: str, groups: Sequence[dict[str, Any]], ignore: Sequence[str], *, rotated: bool
) -> dict[str, Any]:
    config = {
        "quant_method": NAME,
        "format": format_name,
        "quantization_status": "compressed",
        "version": _WRITTEN_AS,
        "config_groups": {f"group_{index}": group for index, group in enumerate(groups)},
        "ignore": list(ignore),
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
    }
    return config | {"quant_method": ROTATED, "rotation": ROTATION} if rotated else config


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
    *rows, K = shape
    if precision.name == "mxfp4":
        halves, exponents = (*rows, K // 2), (*rows, precision.scales_per_channel(K))
        return {f"{name}{PACKED}": (torch.uint8, halves), f"{name}{SCALE}": (torch.uint8, exponents)}
    scales = {f"{name}{SCALE}": (dtype, (*rows, precision.scales_per_channel(K)))}
    if not _is_packed(precision):
        return {name: (CODE_DTYPES[precision.weights.name], shape), **scales}
    words = (*rows, words_in(K, precision.weights.bits))
    return {f"{name}{PACKED}": (torch.int32, words), **scales, f"{name}{SHAPE}": (torch.int64, (len(shape),))}


def store(name: str, weight: QuantizedTensor, precision: Precision) -> dict[str, Tensor]:
    """The tensors that a weight is stored as: what ``entries`` declares.

    Args:
        name: The weight's full name.
        weight: Codes and scales.
        precision: Its precision.
    """
    if precision.name == "mxfp4":
        return {f"{name}{PACKED}": weight.codes, f"{name}{SCALE}": exponents_of(weight.scales)}
    scales = {f"{name}{SCALE}": weight.scales}
    if not _is_packed(precision):
        return {name: weight.codes, **scales}
    words = pack_words(weight.codes, precision.weights.bits)
    return {f"{name}{PACKED}": words, **scales, f"{name}{SHAPE}": torch.tensor(weight.shape)}


def stored_weights(source: Source, config: dict[str, Any]) -> dict[str, StoredWeight]:
    """The quantized weights of a checkpoint, by the names that they have in a model.

    Args:
        source: The checkpoint.
        config: Its ``quantization_config``.

    Raises:
        FewbitsError: If the configuration or a weight says something that fewbits cannot read, or a tensor that belongs
            to a weight is missing or has another shape or dtype: without it codes stand for nothing.
    """
    schemes = schemes_of(config, source.path)
    found = {}
    for tensor in source.tensors.values():
        if tensor.name.endswith((SCALE, SHAPE, ZERO_POINT)):
            continue
        of_packed = tensor.name.removesuffix(PACKED) if tensor.name.endswith(PACKED) else None
        name = of_packed or tensor.name
        scaled = f"{name}{SCALE}" in source.tensors
        if of_packed or tensor.stored_as in CODES or scaled:
            found[name] = stored_weight(source, name, tensor, schemes.of(name.removesuffix(".weight")))
    return found


def _is_packed(precision: Precision) -> bool:
    return _FORMATS[precision.name] == "pack-quantized"
