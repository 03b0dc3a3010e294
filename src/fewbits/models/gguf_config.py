"""What the metadata of a GGUF file says about the model: its configuration, and the names of its tensors.

The key names are transformers' own table, applied to metadata parsed by `gguf_header`: transformers' reader would take
seconds. What that table leaves out and the model depends on (head size, biases, rotary scaling) is filled in here, and
what cannot be represented is refused rather than dropped.
"""

from dataclasses import dataclass
from typing import Any

import torch
from gguf import GGML_QUANT_SIZES, MODEL_ARCH, GGMLQuantizationType, get_tensor_name_map
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig
from transformers.integrations.ggml import GGUF_CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from fewbits.errors import FewbitsError
from fewbits.models.gguf_header import GgufHeader
from fewbits.models.gguf_rope import ROPE_FREQUENCIES, gguf_rope


@dataclass(frozen=True)
class Architecture:
    """How files of one `general.architecture` are read.

    `names` is the architecture whose tensor names the gguf package knows. In `permuted` tensors llama.cpp stores each
    head's rows in the order of its rotary embedding (pairs side by side) and Hugging Face in halves. `model_type` is
    transformers' name where it is another one; `norm_offset` is what the model adds to the weights of its norms, and
    llama.cpp's converter has added already.
    """

    names: MODEL_ARCH
    permuted: tuple[str, ...] = ()
    model_type: str | None = None
    norm_offset: float = 0.0


ARCHITECTURES = {
    "llama": Architecture(MODEL_ARCH.LLAMA, permuted=(".attn_q.", ".attn_k.")),
    "mistral": Architecture(MODEL_ARCH.LLAMA),
    "qwen2": Architecture(MODEL_ARCH.QWEN2),
    "qwen3": Architecture(MODEL_ARCH.QWEN3),
    "phi3": Architecture(MODEL_ARCH.PHI3),
    "gemma3": Architecture(MODEL_ARCH.GEMMA3, model_type="gemma3_text", norm_offset=1.0),
}
_REQUIRED = ("block_count", "context_length", "embedding_length", "feed_forward_length", "attention.head_count")


def gguf_architecture(header: GgufHeader) -> str:
    """The file's architecture.

    Raises:
        FewbitsError: None is stated, it is not one that is read, or the file is one part of several.
    """
    architecture = header.text("general.architecture")
    known = architecture in ARCHITECTURES
    if not known or header.index(f"{architecture}.expert_count"):
        experts = " with experts" if known else ""
        raise FewbitsError(
            f"{header.path}: architecture {architecture!r}{experts} is not read from GGUF ({', '.join(ARCHITECTURES)} "
            "are); use the folder of safetensors that the file was made from"
        )
    if (parts := header.index("split.count") or 1) > 1:
        raise FewbitsError(
            f"{header.path}: is one of {parts} parts of a model; join them with llama-gguf-split --merge first"
        )
    return architecture


def gguf_config(header: GgufHeader) -> PreTrainedConfig:
    """The transformers configuration of the model in a GGUF file.

    Raises:
        FewbitsError: A key is missing, or the configuration cannot be expressed in transformers' terms.
    """
    architecture = gguf_architecture(header)
    for key in _REQUIRED:
        header.whole(f"{architecture}.{key}")
    if (blocks := header.metadata[f"{architecture}.block_count"]) > len(header.tensors):
        raise FewbitsError(f"{header.path}: {blocks} blocks cannot be made of {len(header.tensors)} tensors")
    values = _mapped(header, architecture) | _derived(header, architecture)
    values.pop("rope_theta", None)  # stands in rope_parameters
    if architecture == "gemma3":
        values |= _gemma3(header, values)
    elif architecture == "phi3":
        values |= _phi3(header, values)
    try:
        config = AutoConfig.for_model(**values)
    except Exception as error:  # transformers checks values with whatever exception comes
        raise FewbitsError(f"{header.path}: transformers refuses its configuration: {_one_line(error)}") from error
    config.architectures = [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[config.model_type]]
    return config


def gguf_names(header: GgufHeader, config: PreTrainedConfig) -> dict[str, str]:
    """From Hugging Face parameter name to GGUF tensor name, in file order: every parameter, and nothing left over.

    Raises:
        FewbitsError: The file lacks a parameter, has a tensor that is none, or one of another shape.
    """
    shapes = _parameter_shapes(header, config)
    name_map = get_tensor_name_map(ARCHITECTURES[gguf_architecture(header)].names, config.num_hidden_layers)
    by_gguf_name = {}
    for name in shapes:
        module, _, kind = name.rpartition(".")
        by_gguf_name[f"{name_map.get_name(module)}.{kind}"] = name
    if missing := [name for name in by_gguf_name if name not in header.tensors]:
        raise FewbitsError(
            f"{header.path}: lacks {missing[0]!r} (the parameter {by_gguf_name[missing[0]]}); fetch the file again"
        )
    names: dict[str, str] = {}
    for tensor in header.tensors.values():
        if tensor.name == ROPE_FREQUENCIES:  # no parameter: see gguf_rope
            continue
        if tensor.name not in by_gguf_name:
            raise FewbitsError(f"{header.path}: tensor {tensor.name!r} is no parameter of a {config.model_type} model")
        name = by_gguf_name[tensor.name]
        if tensor.shape != shapes[name]:
            raise FewbitsError(
                f"{header.path}: tensor {tensor.name!r} has shape {list(tensor.shape)}, but the metadata asks for "
                f"{list(shapes[name])}"
            )
        names[name] = tensor.name
    return names


def _parameter_shapes(header: GgufHeader, config: PreTrainedConfig) -> dict[str, tuple[int, ...]]:
    try:
        with torch.device("meta"):  # no memory, no initialization
            model = AutoModelForCausalLM.from_config(config)
    except Exception as error:  # absurd sizes fail somewhere inside the model
        raise FewbitsError(f"{header.path}: transformers cannot build the model: {_one_line(error)}") from error
    tied = set(model._tied_weights_keys or ()) if config.tie_word_embeddings else set()
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items() if name not in tied}


def _mapped(header: GgufHeader, architecture: str) -> dict[str, Any]:
    """The values that transformers' table names, from the keys of the architecture, `general` and `tokenizer`."""
    values = {}
    for key, value in header.metadata.items():
        section, _, rest = key.partition(".")
        if section not in (architecture, "general", "tokenizer"):
            continue
        target = GGUF_CONFIG_MAPPING[section].get(rest)
        if target is not None:
            values[target] = value
    return values


def _derived(header: GgufHeader, architecture: str) -> dict[str, Any]:
    """The values that stand in no key, or in keys that transformers' table leaves out."""
    metadata, tensors = header.metadata, header.tensors
    heads = header.whole(f"{architecture}.attention.head_count")
    head_dim = header.whole(
        f"{architecture}.attention.key_length", metadata[f"{architecture}.embedding_length"] // heads
    )
    derived: dict[str, Any] = {
        "tie_word_embeddings": "output.weight" not in tensors,
        "num_key_value_heads": header.whole(f"{architecture}.attention.head_count_kv", heads),
        "rope_parameters": gguf_rope(header, architecture, head_dim),
        "dtype": _nominal_dtype(header),
    }
    if f"{architecture}.attention.key_length" in metadata:
        derived["head_dim"] = head_dim
    if architecture == "llama" and "blk.0.attn_q.bias" in tensors:
        derived["attention_bias"] = True
    if f"{architecture}.vocab_size" not in metadata and "tokenizer.ggml.tokens" in metadata:
        derived["vocab_size"] = len(metadata["tokenizer.ggml.tokens"])
    return derived


def _gemma3(header: GgufHeader, values: dict[str, Any]) -> dict[str, Any]:
    """What Gemma 3 has beside: layers with a window, which rotate otherwise, and a scale of attention."""
    heads, head_dim = values["num_attention_heads"], values.get("head_dim", 256)
    local = {"rope_theta": header.number("gemma3.rope.freq_base_swa", 10_000.0), "rope_type": "default"}
    return {
        "model_type": ARCHITECTURES["gemma3"].model_type,
        "rope_parameters": {"full_attention": values["rope_parameters"], "sliding_attention": local},
        # the 27B, which llama.cpp knows by its number of layers, scales by another size
        "query_pre_attn_scalar": values["hidden_size"] // heads if values["num_hidden_layers"] == 62 else head_dim,
        "final_logit_softcapping": header.metadata.get("gemma3.final_logit_softcapping"),
        **_special_tokens(header),
    }


def _phi3(header: GgufHeader, values: dict[str, Any]) -> dict[str, Any]:
    """What Phi-3 has beside; a window of 0 positions stands for none."""
    original = header.whole("phi3.rope.scaling.original_context_length", values["max_position_embeddings"])
    return {
        "original_max_position_embeddings": original,
        "sliding_window": header.index("phi3.attention.sliding_window") or None,
        **_special_tokens(header),
    }


def _special_tokens(header: GgufHeader) -> dict[str, Any]:
    """Token ids of the configuration, for architectures whose defaults are of a full vocabulary."""
    names = {"bos": "bos", "eos": "eos", "padding": "pad"}
    return {f"{its}_token_id": header.index(f"tokenizer.ggml.{name}_token_id") for name, its in names.items()}


def _nominal_dtype(header: GgufHeader) -> torch.dtype:
    """The dtype of the model the file was made from; block types do not say, and bfloat16 is the usual one."""
    types = {tensor.type for tensor in header.tensors.values()}
    blocks = any(GGML_QUANT_SIZES[kind][0] > 1 for kind in types)
    if blocks or GGMLQuantizationType.BF16 in types:
        return torch.bfloat16
    return torch.float16 if GGMLQuantizationType.F16 in types else torch.float32


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
