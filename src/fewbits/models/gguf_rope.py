"""The rotary embedding that a GGUF file describes, as transformers' `rope_parameters`.

llama.cpp has keys for linear and YaRN scaling. Llama 3's scaling has none: the file carries the factor by which each
frequency is divided, a tensor `rope_freqs.weight` of head size / 2 elements, and transformers the parameters that give
them. Dropping either leaves a model that answers short prompts well and long ones badly, with no sign of why.
"""

import math
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType

from fewbits.errors import FewbitsError
from fewbits.models.gguf_header import GgufHeader

ROPE_FREQUENCIES = "rope_freqs.weight"
_DEFAULT_BASE = 10_000.0  # llama.cpp's, where the file states none
# What every Llama 3.1, 3.2 and 3.3 has beside its factor: https://huggingface.co/meta-llama/Llama-3.1-8B, config.json
LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


def gguf_rope(header: GgufHeader, architecture: str, head_dim: int) -> dict[str, Any]:
    """`rope_parameters` of the model: base, type of scaling, and its parameters.

    Raises:
        FewbitsError: A scaling that transformers' parameters cannot express.
    """
    keys = f"{architecture}.rope."
    base = header.number(keys + "freq_base", _DEFAULT_BASE)
    parameters: dict[str, Any] = {"rope_theta": base, "rope_type": "default"}
    if (rotated := header.whole(keys + "dimension_count", head_dim)) != head_dim:
        raise FewbitsError(
            f"{header.path}: rotates {rotated} of {head_dim} elements of a head, which is not read for {architecture}; "
            "use the folder of safetensors that the file was made from"
        )
    if ROPE_FREQUENCIES in header.tensors:
        return parameters | _llama3(header, base, head_dim)
    kind = header.text(keys + "scaling.type", "none")
    if kind not in ("none", "linear", "yarn"):
        raise FewbitsError(
            f"{header.path}: rotary scaling {kind!r} is not read (linear and yarn are); use the folder of safetensors "
            "that the file was made from"
        )
    if kind == "none":
        return parameters
    parameters |= {"rope_type": kind, "factor": header.number(keys + "scaling.factor")}
    if (original := keys + "scaling.original_context_length") in header.metadata:
        parameters["original_max_position_embeddings"] = header.whole(original)
    return parameters


def llama3_frequency_factors(base: float, head_dim: int, factor: float) -> "np.ndarray[Any, np.dtype[np.float64]]":
    """By how much Llama 3 divides each rotary frequency; head_dim / 2 elements.

    Wavelengths (positions per turn) above the original context over `low_freq_factor` are stretched by `factor`, those
    below it over `high_freq_factor` are left alone, and those between are interpolated.
    Source: https://github.com/meta-llama/llama-models, `models/llama3/model.py`, `apply_scaling`.
    """
    low, high, context = LLAMA3.values()
    turns = context * base ** -(np.arange(0, head_dim, 2) / head_dim) / (2 * math.pi)  # over the original context
    weight = np.clip((turns - low) / (high - low), 0.0, 1.0)
    return np.asarray(1.0 / ((1.0 - weight) / factor + weight))


def _llama3(header: GgufHeader, base: float, head_dim: int) -> dict[str, Any]:
    tensor = header.tensors[ROPE_FREQUENCIES]
    stored = np.ones(0, np.float32)
    if tensor.type is GGMLQuantizationType.F32:
        stored = np.fromfile(header.path, np.float32, tensor.nbytes // 4, offset=tensor.offset)
    factor = round(float(stored.max(initial=1.0)), 3)
    if stored.shape == (head_dim // 2,) and np.allclose(
        stored, llama3_frequency_factors(base, head_dim, factor), rtol=1e-4
    ):
        return {"rope_type": "llama3", "factor": factor, **LLAMA3} if factor != 1.0 else {}
    raise FewbitsError(
        f"{header.path}: the factors in {ROPE_FREQUENCIES!r} are not those of Llama 3's rotary scaling; use the folder "
        "of safetensors that the file was made from"
    )
