"""What a GGUF file says about a model before its tensors: transformers' configuration as metadata keys.

llama.cpp takes for granted what it has no key for: an activation, a missing bias, a full head that is rotated. A
configuration that says otherwise is refused here, since the file would run and answer wrongly.
Source: https://github.com/ggml-org/llama.cpp, `src/llama-arch.cpp` (keys), `src/models/` (what an architecture reads).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from transformers import PreTrainedConfig

from fewbits.errors import FewbitsError
from fewbits.models.gguf_rope import LLAMA3, llama3_frequency_factors

Keys = dict[str, Any]
"""Metadata by key; int, float, bool, str, or a list of one of them."""


@dataclass(frozen=True)
class Family:
    """How models of one transformers `model_type` are written.

    Attributes:
        architecture: `general.architecture`.
        granted: Values of the configuration that llama.cpp takes for granted.
        scalings: Types of rotary scaling it has keys or tensors for.
        window: The configuration's key of a sliding window that llama.cpp does not have for this architecture.
    """

    architecture: str
    granted: dict[str, Any] = field(default_factory=dict)
    scalings: tuple[str, ...] = ("linear", "yarn")
    window: str | None = None


_SILU = {"hidden_act": "silu"}
FAMILIES = {
    "llama": Family("llama", _SILU | {"mlp_bias": False}, ("linear", "yarn", "llama3")),
    "mistral": Family("llama", _SILU, window="sliding_window"),
    "qwen2": Family("qwen2", _SILU, window="sliding_window"),
    "qwen3": Family("qwen3", _SILU | {"attention_bias": False}, window="sliding_window"),
    "phi3": Family("phi3", _SILU, scalings=()),
    "gemma3_text": Family(
        "gemma3",
        {
            "hidden_activation": "gelu_pytorch_tanh",
            "attention_bias": False,
            "attn_logit_softcapping": None,
            "use_bidirectional_attention": False,
        },
        scalings=("linear",),
    ),
}
# Parameters of a scaling that are written; llama.cpp computes the others as transformers does where they are absent.
_WRITTEN = {
    "default": {"partial_rotary_factor"},
    "linear": {"factor"},
    "yarn": {"factor", "original_max_position_embeddings"},
    "llama3": {"factor", *LLAMA3},
}


def family_of(config: PreTrainedConfig, path: Path) -> Family:
    """How a model is written.

    Raises:
        FewbitsError: Its type is none that is written, or its configuration is one that llama.cpp cannot follow.
    """
    family = FAMILIES.get(config.model_type)
    if family is None:
        raise FewbitsError(
            f"{path}: models of type {config.model_type!r} are not written as GGUF ({', '.join(FAMILIES)} are); use "
            "--layout compressed-tensors"
        )
    for key, value in family.granted.items():
        if (found := getattr(config, key, value)) != value:
            _refuse(path, f"{key} is {found!r}, and readers of GGUF take {value!r} for granted")
    return family


def head_size(config: PreTrainedConfig) -> int:
    """Elements of an attention head."""
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def model_keys(config: PreTrainedConfig, path: Path) -> Keys:
    """The keys of the architecture.

    Raises:
        FewbitsError: The configuration is one that llama.cpp cannot follow; the message names the value.
    """
    family = family_of(config, path)
    keys: Keys = {
        "vocab_size": config.vocab_size,
        "context_length": _context_length(config, family),
        "embedding_length": config.hidden_size,
        "block_count": config.num_hidden_layers,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
    }
    if getattr(config, "head_dim", None):
        keys |= {"attention.key_length": config.head_dim, "attention.value_length": config.head_dim}
    if config.model_type == "gemma3_text":
        keys |= _gemma3_keys(config, path)
    elif config.model_type == "phi3":
        keys["attention.sliding_window"] = config.sliding_window or 0
        keys["rope.scaling.original_context_length"] = config.original_max_position_embeddings
    keys |= _rope_keys(config, family, path)
    return {f"{family.architecture}.{key}": value for key, value in keys.items()}


def frequency_factors(config: PreTrainedConfig) -> np.ndarray[Any, np.dtype[np.float32]] | None:
    """By how much each rotary frequency is divided, head size / 2 elements, where the model is scaled like Llama 3."""
    rope = config.rope_parameters
    if rope.get("rope_type") != "llama3":
        return None
    factors = llama3_frequency_factors(float(rope["rope_theta"]), head_size(config), float(rope["factor"]))
    return factors.astype(np.float32)


def _context_length(config: PreTrainedConfig, family: Family) -> int:
    """Positions up to which the file's model is the original; without the window that llama.cpp lacks, its length."""
    length = int(config.max_position_embeddings)
    window = getattr(config, family.window, None) if family.window else None
    return length if not window else min(length, int(window))


def _rope_keys(config: PreTrainedConfig, family: Family, path: Path) -> Keys:
    rope = config.rope_parameters
    rope = rope.get("full_attention", rope)
    kind = rope.get("rope_type", "default")
    if kind != "default" and kind not in family.scalings:
        known = f"{', '.join(family.scalings)} are" if family.scalings else "none is"
        _refuse(path, f"rotary scaling {kind!r} of {config.model_type} is not written ({known})")
    unknown = {key for key, value in rope.items() if value is not None} - {"rope_theta", "rope_type"} - _WRITTEN[kind]
    if unknown:
        name = min(unknown)
        _refuse(path, f"the parameter {name}={rope[name]!r} of rotary scaling {kind!r} is not written")
    if (part := rope.get("partial_rotary_factor") or 1.0) != 1.0:
        _refuse(path, f"only {part} of each head is rotated, which is not written")
    if kind == "llama3" and (odd := [key for key, value in LLAMA3.items() if rope[key] != value]):
        _refuse(path, f"{odd[0]} of Llama 3's rotary scaling is {rope[odd[0]]!r}, not {LLAMA3[odd[0]]!r}")
    keys: Keys = {"rope.dimension_count": head_size(config), "rope.freq_base": float(rope["rope_theta"])}
    if kind in ("linear", "yarn"):
        keys |= {"rope.scaling.type": kind, "rope.scaling.factor": float(rope["factor"])}
        if original := rope.get("original_max_position_embeddings"):
            keys["rope.scaling.original_context_length"] = int(original)
    return keys


def _gemma3_keys(config: PreTrainedConfig, path: Path) -> Keys:
    layers = range(1, config.num_hidden_layers + 1)
    pattern = ["full_attention" if layer % 6 == 0 else "sliding_attention" for layer in layers]
    if config.layer_types != pattern:
        _refuse(path, "its layers do not follow Gemma 3's pattern of five with a sliding window and one without")
    # llama.cpp knows the 27B, which scales otherwise, by its number of layers
    scalar = config.hidden_size // config.num_attention_heads if config.num_hidden_layers == 62 else config.head_dim
    if config.query_pre_attn_scalar != scalar:
        _refuse(path, f"query_pre_attn_scalar is {config.query_pre_attn_scalar}, and readers take {scalar} for granted")
    keys: Keys = {"attention.sliding_window": config.sliding_window}
    keys["rope.freq_base_swa"] = float(config.rope_parameters["sliding_attention"]["rope_theta"])
    if config.final_logit_softcapping:
        keys["final_logit_softcapping"] = float(config.final_logit_softcapping)
    return keys


def _refuse(path: Path, why: str) -> NoReturn:
    raise FewbitsError(f"{path}: {why}; use --layout compressed-tensors")
