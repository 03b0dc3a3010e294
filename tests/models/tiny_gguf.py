"""Tiny GGUF files with random weights, written by the gguf package: what the GGUF tests read."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as T
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, PreTrainedConfig, Qwen2Config, Qwen3Config
from transformers.convert_slow_tokenizer import bytes_to_unicode

SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
}
CONFIGS = {"llama": LlamaConfig, "mistral": MistralConfig, "qwen2": Qwen2Config, "qwen3": Qwen3Config}
NAMES = {
    "llama": gguf.MODEL_ARCH.LLAMA,
    "mistral": gguf.MODEL_ARCH.LLAMA,
    "qwen2": gguf.MODEL_ARCH.QWEN2,
    "qwen3": gguf.MODEL_ARCH.QWEN3,
}

# A byte-level vocabulary: every byte, two merges, and special tokens (3: control, 4: user-defined).
BYTES = list(bytes_to_unicode().values())
TOKENS = [*BYTES, "he", "hel", "<|end|>", "<|user|>", "<think>"]
TOKEN_TYPES = [1] * 258 + [3, 3, 4]
MERGES = ["h e", "he l"]
TEMPLATE = "{% for message in messages %}<|user|>{{ message['content'] }}<|end|>{% endfor %}"

# A sentencepiece vocabulary: pieces with scores.
PIECES = [
    "<unk>",
    "<s>",
    "</s>",
    *[f"<0x{byte:02X}>" for byte in range(256)],
    "▁",
    "h",
    "e",
    "l",
    "o",
    "he",
    "▁he",
    "ll",
]
PIECE_TYPES = [2, 3, 3, *[6] * 256, *[1] * 8]


def tiny_config(architecture: str = "llama", **changes: Any) -> PreTrainedConfig:
    extra = {"head_dim": 16} if architecture == "qwen3" else {}
    return CONFIGS[architecture](**(SIZES | {"vocab_size": len(TOKENS)} | extra | changes))


@dataclass
class TinyGguf:
    """What to write; every field has a default, and a test changes the one it is about."""

    architecture: str = "llama"
    config: PreTrainedConfig = None  # type: ignore[assignment]
    type: T = T.F32  # of every matrix whose rows are whole blocks of it
    tokenizer: str | None = "gpt2"
    metadata: dict[str, Any] = field(default_factory=dict)  # added last, replaces
    tensors: dict[str, np.ndarray] = field(default_factory=dict)  # added
    without: tuple[str, ...] = ()  # tensors and metadata keys left out
    raw: dict[str, T] = field(default_factory=dict)  # tensors filled with random bytes of a type

    def write(self, path: Path) -> dict[str, torch.Tensor]:
        """Write the file; the Hugging Face state dict it stands for (before any rounding to `type`)."""
        self.config = self.config or tiny_config(self.architecture)
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(self.config, dtype=torch.float32)
        writer = gguf.GGUFWriter(path, self.architecture)
        for key, value in (self._model_keys() | self._tokenizer_keys() | self.metadata).items():
            if key not in self.without:
                _add(writer, key, value)
        for name, tensor in self._gguf_tensors(model).items():
            if name not in self.without:
                self._add_tensor(writer, name, tensor)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return {name: tensor.clone() for name, tensor in model.state_dict().items()}

    def _add_tensor(self, writer: gguf.GGUFWriter, name: str, data: np.ndarray) -> None:
        if name in self.raw:
            block, block_bytes = gguf.GGML_QUANT_SIZES[self.raw[name]]
            shape = (data.shape[0], data.shape[1] // block * block_bytes)
            noise = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
            writer.add_tensor(name, noise, raw_dtype=self.raw[name])
        elif data.ndim == 2 and data.shape[1] % gguf.GGML_QUANT_SIZES[self.type][0] == 0 and self.type != T.F32:
            writer.add_tensor(name, gguf.quantize(data, self.type), raw_dtype=self.type)
        else:
            writer.add_tensor(name, data)

    def _gguf_tensors(self, model: torch.nn.Module) -> dict[str, np.ndarray]:
        names = gguf.get_tensor_name_map(NAMES[self.architecture], self.config.num_hidden_layers)
        tied = self.config.tie_word_embeddings
        tensors = {}
        for name, tensor in model.state_dict().items():
            if tied and name == "lm_head.weight":
                continue
            module, _, kind = name.rpartition(".")
            data = tensor.numpy()
            if self.architecture == "llama" and (".q_proj." in name or ".k_proj." in name):
                heads = self.config.num_attention_heads if ".q_proj." in name else self.config.num_key_value_heads
                data = _pairs(data, heads)
            tensors[f"{names.get_name(module)}.{kind}"] = np.ascontiguousarray(data)
        return tensors | self.tensors

    def _model_keys(self) -> dict[str, Any]:
        config, prefix = self.config, self.architecture
        keys = {
            "block_count": config.num_hidden_layers,
            "context_length": config.max_position_embeddings,
            "embedding_length": config.hidden_size,
            "feed_forward_length": config.intermediate_size,
            "attention.head_count": config.num_attention_heads,
            "attention.head_count_kv": config.num_key_value_heads,
            "attention.layer_norm_rms_epsilon": config.rms_norm_eps,
            "rope.freq_base": float(config.rope_parameters["rope_theta"]),
            "vocab_size": config.vocab_size,
        }
        if self.architecture == "qwen3":
            keys["attention.key_length"] = config.head_dim
        return {f"{prefix}.{key}": value for key, value in keys.items()}

    def _tokenizer_keys(self) -> dict[str, Any]:
        keys: dict[str, Any] = {"model": self.tokenizer, "bos_token_id": 1, "eos_token_id": 2, "add_bos_token": False}
        if self.tokenizer == "gpt2":
            keys |= {"pre": "smollm", "tokens": TOKENS, "token_type": TOKEN_TYPES, "merges": MERGES}
            keys |= {"bos_token_id": 259, "eos_token_id": 258, "padding_token_id": 258, "unknown_token_id": 258}
        elif self.tokenizer == "llama":
            keys |= {"pre": "default", "tokens": PIECES, "token_type": PIECE_TYPES, "unknown_token_id": 0}
            keys |= {"scores": [-float(index) for index in range(len(PIECES))]}
            del keys["add_bos_token"]
        else:
            return {}
        return {f"tokenizer.ggml.{key}": value for key, value in keys.items()} | {"tokenizer.chat_template": TEMPLATE}


def _pairs(data: np.ndarray, heads: int) -> np.ndarray:
    """The row order that llama.cpp's converter gives query and key matrices."""
    return data.reshape(heads, 2, -1, *data.shape[1:]).swapaxes(1, 2).reshape(data.shape)


def _add(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    match value:
        case bool():
            writer.add_bool(key, value)
        case int():
            writer.add_uint32(key, value)
        case float():
            writer.add_float32(key, value)
        case str():
            writer.add_string(key, value)
        case _:
            writer.add_array(key, value)
