"""Tiny random models of the families that transformers carries, and by hand, which of their layers are quantized."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from tiny_folder import byte_level_tokenizer

import fewbits

_SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 320,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_GROUPED = _SIZES | {"num_key_value_heads": 2}
_GPT = {key: _SIZES[key] for key in ("vocab_size", "bos_token_id", "eos_token_id", "pad_token_id")}

_ATTENTION = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
_LLAMA = (*_ATTENTION, "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
_OPT_ATTENTION = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.out_proj")
_BERT = (
    *("attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense"),
    *("intermediate.dense", "output.dense"),
)
_T5_ATTENTION = tuple(f"layer.0.SelfAttention.{leaf}" for leaf in "qkvo")
_T5_CROSS = tuple(f"layer.1.EncDecAttention.{leaf}" for leaf in "qkvo")


@dataclass(frozen=True)
class Family:
    """One family.

    Attributes:
        model_type: As in `config.json`.
        settings: Of its configuration.
        layers: Path of the layers, with a hole for the number, and the modules in each that are quantized.
        others: Quantized modules outside; the output head is among them.
        kept: Linear layers and routers that must stay in float.
        task: Which Auto class.
    """

    model_type: str
    settings: dict[str, Any]
    layers: dict[str, tuple[str, ...]]
    others: tuple[str, ...] = ("lm_head",)
    kept: tuple[str, ...] = ()
    task: str = "ForCausalLM"

    @property
    def quantized(self) -> set[str]:
        """Names of all modules that are quantized."""
        layers = {f"{path.format(n)}.{leaf}" for path, leaves in self.layers.items() for leaf in leaves for n in (0, 1)}
        return layers | set(self.others)

    @property
    def ours(self) -> Any:
        return getattr(fewbits, f"AutoModel{self.task}")

    @property
    def theirs(self) -> Any:
        return getattr(transformers, f"AutoModel{self.task}")


def _decoder(model_type: str, leaves: tuple[str, ...], *, kept: tuple[str, ...] = (), **settings: Any) -> Family:
    kept = tuple(f"model.layers.{n}.{leaf}" for leaf in kept for n in (0, 1))
    return Family(model_type, _GROUPED | settings, {"model.layers.{}": leaves}, kept=kept)


FAMILIES = {
    "llama": _decoder("llama", _LLAMA),
    "qwen2": _decoder("qwen2", _LLAMA),
    "qwen3": _decoder("qwen3", _LLAMA, head_dim=16),
    "mistral": _decoder("mistral", _LLAMA),
    "gemma3": _decoder("gemma3_text", _LLAMA, head_dim=16, query_pre_attn_scalar=16, sliding_window=16),
    "phi3": _decoder("phi3", ("self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj")),
    "gpt2": Family(
        "gpt2",
        _GPT | {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64},
        {"transformer.h.{}": ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")},
    ),
    "bloom": Family(
        "bloom",
        _GPT | {"hidden_size": 64, "n_layer": 2, "n_head": 4},
        {
            "transformer.h.{}": (
                *("self_attention.query_key_value", "self_attention.dense"),
                *("mlp.dense_h_to_4h", "mlp.dense_4h_to_h"),
            )
        },
    ),
    "opt": Family(
        "opt",
        _SIZES | {"ffn_dim": 96, "word_embed_proj_dim": 32},
        {"model.decoder.layers.{}": (*_OPT_ATTENTION, "fc1", "fc2")},
        others=("model.decoder.project_in", "model.decoder.project_out", "lm_head"),
    ),
    "t5": Family(
        "t5",
        _GPT | {"d_model": 64, "d_ff": 96, "d_kv": 16, "num_layers": 2, "num_heads": 4, "decoder_start_token_id": 0},
        {
            "encoder.block.{}": (*_T5_ATTENTION, "layer.1.DenseReluDense.wi", "layer.1.DenseReluDense.wo"),
            "decoder.block.{}": (
                *(*_T5_ATTENTION, *_T5_CROSS),
                *("layer.2.DenseReluDense.wi", "layer.2.DenseReluDense.wo"),
            ),
        },
        task="ForSeq2SeqLM",
    ),
    "bert": Family("bert", _SIZES, {"encoder.layer.{}": _BERT}, others=("pooler.dense",), task=""),
    "nomic-bert": Family(
        "nomic_bert",
        _SIZES,
        {"layers.{}": _LLAMA},
        others=(),
        task="",
    ),
    "gte": Family("gte", _SIZES, {"layers.{}": _LLAMA}, others=(), task=""),
    "bert-classifier": Family(
        "bert",
        _SIZES,
        {"bert.encoder.layer.{}": _BERT},
        others=("bert.pooler.dense",),
        kept=("classifier",),
        task="ForSequenceClassification",
    ),
    "llama-classifier": Family(
        "llama",
        _GROUPED,
        {"model.layers.{}": _LLAMA},
        others=(),
        kept=("score",),
        task="ForSequenceClassification",
    ),
    "mixtral": _decoder("mixtral", (*_ATTENTION, "mlp.experts"), kept=("mlp.gate",), num_local_experts=4),
    "qwen2-moe": _decoder(
        "qwen2_moe",
        (*_ATTENTION, "mlp.experts", *(f"mlp.shared_expert.{leaf}_proj" for leaf in ("gate", "up", "down"))),
        kept=("mlp.gate", "mlp.shared_expert_gate"),
        num_experts=4,
        moe_intermediate_size=32,
        shared_expert_intermediate_size=32,
    ),
    "hunyuan-moe": _decoder(
        "hunyuan_v1_moe",
        (*_ATTENTION, "mlp.experts", *(f"mlp.shared_mlp.{leaf}_proj" for leaf in ("gate", "up", "down"))),
        kept=("mlp.gate.wg",),
        num_experts=4,
        moe_topk=2,
        head_dim=16,
    ),
    "qwen3-moe": _decoder(
        "qwen3_moe",
        (*_ATTENTION, "mlp.experts"),
        kept=("mlp.gate",),
        num_experts=12,
        num_experts_per_tok=2,
        moe_intermediate_size=32,
        head_dim=16,
    ),
}


def write_family(name: str, folder: Path, *, dtype: torch.dtype = torch.float32, **changes: Any) -> None:
    """Write a model of the family with a tokenizer; no parameter is zero or one, so that a misplaced one shows."""
    family = FAMILIES[name]
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(family.model_type, **(family.settings | changes))
    model = family.theirs.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                torch.nn.init.normal_(parameter, 0, 0.08)
            else:
                parameter += 0.1 * torch.randn(parameter.shape)
    model.to(dtype).save_pretrained(folder)
    byte_level_tokenizer().save_pretrained(folder)


def inputs(name: str) -> dict[str, torch.Tensor]:
    """What its models are called with: 32 tokens."""
    ids = torch.arange(3, 35).view(1, 32)
    return {"input_ids": ids} | ({"decoder_input_ids": ids.flip(1)} if name == "t5" else {})


def output(name: str, model: torch.nn.Module) -> torch.Tensor:
    """Its logits, or of a model without a head its last hidden state."""
    with torch.no_grad():
        out = model(**inputs(name))
    return out.logits if hasattr(out, "logits") else out.last_hidden_state


def agree(got: torch.Tensor, expected: torch.Tensor) -> bool:
    """Whether outputs differ by no more than sums in another order do: they carry some activations across a step.

    So the outputs of a decoder layer in one native call, beside those of its modules one after the other.
    """
    return bool((got - expected).norm() <= 1e-2 * expected.norm())
