"""Baichuan and Baichuan2 of 7 billion parameters presented as Llama, which they are but for three things.

    model.layers.N.self_attn.W_pack.weight   [3H, H]            q_proj, k_proj and v_proj, H rows each
    lm_head.weight                           [vocabulary, H]    Baichuan2 divides each row by its length
    model.layers.N.self_attn.rotary_emb.inv_freq                left out: it follows from the configuration

The models of 13 billion parameters have ALiBi in place of rotary positions, which transformers has for no network with
RMSNorm and a gated MLP.
Source: `modeling_baichuan.py` of https://huggingface.co/baichuan-inc/Baichuan2-7B-Chat
"""

import torch
from transformers import LlamaConfig

from fewbits.models.adapters.adapted_folder import AdaptedFolder, Layout
from fewbits.models.adapters.baichuan_tokenizer import baichuan_tokenizer
from fewbits.models.adapters.raw_config import RawConfig
from fewbits.models.source import Source

_HEAD = "lm_head.weight"
_FIRST = "BaiChuanForCausalLM"  # Baichuan-7B, the first; all others write themselves BaichuanForCausalLM
_FIRST_VOCABULARY = 64_000
_CHUNK = 1 << 20  # elements normalized at once: their float32 copy takes 4 MiB


def adapt_baichuan(source: Source, raw: RawConfig) -> Source:
    """Present a Baichuan-7B or Baichuan2-7B folder as `LlamaForCausalLM`.

    Raises:
        FewbitsError: A variant that Llama cannot compute, or a checkpoint that does not fit its configuration.
    """
    config = baichuan_config(raw)
    return AdaptedFolder(
        source,
        config,
        _layout(config, normalized=not _is_first(raw)),
        tokenizer=lambda: baichuan_tokenizer(source.path),
        generation_config=source.generation_config,
    )


def baichuan_config(raw: RawConfig) -> LlamaConfig:
    """The configuration of the Llama that a Baichuan-7B or Baichuan2-7B is.

    Raises:
        FewbitsError: A variant that Llama cannot compute.
    """
    # The code of the 13B models knows no max_position_embeddings, and that of the 7B models cannot do without it.
    if "max_position_embeddings" not in raw.settings:
        raise raw.refuse(
            "max_position_embeddings",
            "is a 13B model: its positions are ALiBi, which transformers has for no network of this kind",
            "use Baichuan2-7B, whose positions are rotary",
        )
    return _llama_config(raw)


def _is_first(raw: RawConfig) -> bool:
    """Whether it is Baichuan-7B, whose output head is used as it is stored."""
    named = _FIRST in (raw.settings.get("architectures") or [])
    return named or raw.settings.get("vocab_size") == _FIRST_VOCABULARY


def _llama_config(raw: RawConfig) -> LlamaConfig:
    settings = raw.settings
    heads, hidden = raw.count("num_attention_heads"), raw.count("hidden_size")
    if hidden % heads:
        raise raw.refuse("hidden_size", f"cannot be shared among its {heads} heads", "fetch config.json again")
    if settings.get("tie_word_embeddings"):
        raise raw.refuse(
            "tie_word_embeddings", "is no published model: they have an output head of their own", "use Baichuan2-7B"
        )
    config = LlamaConfig(
        vocab_size=raw.count("vocab_size"),
        hidden_size=hidden,
        intermediate_size=raw.count("intermediate_size"),
        num_hidden_layers=raw.count("num_hidden_layers"),
        num_attention_heads=heads,
        num_key_value_heads=heads,
        hidden_act=settings.get("hidden_act", "silu"),
        max_position_embeddings=raw.count("max_position_embeddings"),
        rms_norm_eps=raw.number("rms_norm_eps", 1e-6),
        rope_parameters={"rope_type": "default", "rope_theta": raw.number("rope_theta", 10_000.0)},
        attention_bias=False,
        mlp_bias=False,
        tie_word_embeddings=False,
        use_cache=settings.get("use_cache", True),
        bos_token_id=settings.get("bos_token_id", 1),
        eos_token_id=settings.get("eos_token_id", 2),
        pad_token_id=settings.get("pad_token_id", 0),
        architectures=["LlamaForCausalLM"],
        dtype=raw.dtype,
    )
    config.name_or_path = str(raw.path)
    return config


def _layout(config: LlamaConfig, *, normalized: bool) -> Layout:
    kept = ["input_layernorm", "self_attn.o_proj", "post_attention_layernorm"]
    kept += ["mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]
    parts: dict[str, dict[str, int]] = {
        name: {name: 0} for name in ("model.embed_tokens.weight", "model.norm.weight", _HEAD)
    }
    for layer in range(config.num_hidden_layers):
        prefix = f"model.layers.{layer}."
        parts[f"{prefix}self_attn.W_pack.weight"] = {
            f"{prefix}self_attn.{part}_proj.weight": config.hidden_size for part in "qkv"
        }
        parts |= {f"{prefix}{module}.weight": {f"{prefix}{module}.weight": 0} for module in kept}
    return Layout(parts, dropped=("rotary_emb.inv_freq",), change={_HEAD: _normalize} if normalized else None)


def _normalize(rows: torch.Tensor) -> torch.Tensor:
    """Each row divided by its Euclidean length, in float32 and rounded to the dtype of the rows; zero rows stay zero.

    A row with NaN or Inf gets NaN, which is refused further on. `rows` is changed in place.
    """
    step = max(1, _CHUNK // max(rows.shape[-1], 1))
    for start in range(0, len(rows), step):
        part = rows[start : start + step]
        part.copy_(torch.nn.functional.normalize(part.float(), dim=-1))
    return rows
