"""ChatGLM2 and ChatGLM3 presented as GLM, which is the same network under other names.

What the original's code says, and where it goes, for L layers of hidden size H, Q query heads and G groups of D
channels, and an MLP of width F:

    transformer.embedding.word_embeddings.weight   [vocabulary, H]     model.embed_tokens
    …layers.N.self_attention.query_key_value       [(Q + 2G)·D, H]     q_proj (Q·D rows), k_proj (G·D), v_proj (G·D)
    …layers.N.self_attention.dense                 [H, Q·D]            o_proj
    …layers.N.mlp.dense_h_to_4h                    [2F, H]             gate_up_proj: gate, then up, in both
    …layers.N.mlp.dense_4h_to_h                    [H, F]              down_proj
    transformer.output_layer.weight                [vocabulary, H]     lm_head

Half of each head's channels are rotated, in neighbouring pairs, in both.
Source: `modeling_chatglm.py` of https://huggingface.co/THUDM/chatglm3-6b
"""

from typing import Any

from transformers import GenerationConfig, GlmConfig

from fewbits.models.adapters.adapted_folder import AdaptedFolder, Layout
from fewbits.models.adapters.chatglm_tokenizer import chatglm_tokenizer, turn_ends
from fewbits.models.adapters.raw_config import RawConfig, read_json
from fewbits.models.source import Source

_ROTARY_BASE = 10_000.0
_GLM4_VOCABULARY = 151_552
_PUBLISHED = "use a checkpoint with the settings of the published ChatGLM2-6B or ChatGLM3-6B"
_UNQUANTIZED = "use the model that it was made from, such as THUDM/chatglm3-6b, with precision='int8' or 'int4'"
# Setting: what the original takes where it is missing, what GLM can do, why not otherwise, and the remedy.
_NEEDED: dict[str, tuple[Any, tuple[Any, ...], str, str]] = {
    "quantization_bit": (0, (0, None), "stores its weights in a few bits of its own layout", _UNQUANTIZED),
    "pre_seq_len": (None, (None, 0), "puts a trained prefix before every text, which GLM does not have", _PUBLISHED),
    "rmsnorm": (True, (True,), "uses LayerNorm, where GLM has RMSNorm", _PUBLISHED),
    "post_layer_norm": (True, (True,), "has no norm after the last layer, where GLM has one", _PUBLISHED),
    "apply_residual_connection_post_layernorm": (
        False,
        (False,),
        "takes the residual after the norm, where GLM takes it before",
        _PUBLISHED,
    ),
    "original_rope": (True, (True,), "rotates channels in another order than GLM", _PUBLISHED),
    "add_bias_linear": (False, (False,), "has biases that GLM has no place for", _PUBLISHED),
    "multi_query_attention": (False, (True,), "keeps query, key and value head by head, not in groups", _PUBLISHED),
}


def adapt_chatglm(source: Source, raw: RawConfig) -> Source:
    """Present a ChatGLM2 or ChatGLM3 folder as `GlmForCausalLM`.

    Raises:
        FewbitsError: A variant that GLM cannot compute, or a checkpoint that does not fit its configuration.
    """
    second = _is_chatglm2(raw)
    config = chatglm_config(raw)
    return AdaptedFolder(
        source,
        config,
        _layout(config),
        tokenizer=lambda: chatglm_tokenizer(source.path, roles=not second),
        generation_config=lambda: _generation_config(source, config, roles=not second),
    )


def chatglm_config(raw: RawConfig) -> GlmConfig:
    """The configuration of the GLM that a ChatGLM2 or ChatGLM3 is.

    Raises:
        FewbitsError: A variant that GLM cannot compute.
    """
    _refuse_variants(raw)
    return _glm_config(raw, _is_chatglm2(raw))


def _refuse_variants(raw: RawConfig) -> None:
    if "padded_vocab_size" not in raw.settings:
        raise raw.refuse(
            "padded_vocab_size", "is not of the architecture of ChatGLM2 and ChatGLM3", "use THUDM/chatglm3-6b"
        )
    if raw.settings["padded_vocab_size"] == _GLM4_VOCABULARY:
        raise raw.refuse(
            "padded_vocab_size", "is GLM-4, whose tokenizer is of another kind", "use THUDM/glm-4-9b-chat-hf"
        )
    for key, (default, possible, why, remedy) in _NEEDED.items():
        if raw.settings.get(key, default) not in possible:
            raise raw.refuse(key, why, remedy)


def _is_chatglm2(raw: RawConfig) -> bool:
    """Whether the checkpoint calls itself ChatGLM2; nothing else in it tells the second from the third."""
    names = (raw.settings.get("_name_or_path"), read_json(raw.path / "tokenizer_config.json").get("name_or_path"))
    return any("chatglm2" in str(name).lower() for name in names)


def _glm_config(raw: RawConfig, second: bool) -> GlmConfig:
    settings = raw.settings
    heads, groups = raw.count("num_attention_heads"), raw.count("multi_query_group_num")
    if heads % groups:
        raise raw.refuse("multi_query_group_num", f"does not divide its {heads} heads", "fetch config.json again")
    config = GlmConfig(
        vocab_size=raw.count("padded_vocab_size"),
        hidden_size=raw.count("hidden_size"),
        intermediate_size=raw.count("ffn_hidden_size"),
        num_hidden_layers=raw.count("num_layers"),
        num_attention_heads=heads,
        num_key_value_heads=groups,
        head_dim=raw.count("kv_channels"),
        attention_bias=bool(settings.get("add_qkv_bias", False)),
        attention_dropout=settings.get("attention_dropout", 0.0),
        max_position_embeddings=raw.count("seq_length"),
        rms_norm_eps=raw.number("layernorm_epsilon", 1e-5),
        rope_parameters=_rotary(raw.number("rope_ratio", 1.0), second),
        tie_word_embeddings=bool(settings.get("tie_word_embeddings", False)),
        use_cache=settings.get("use_cache", True),
        eos_token_id=settings.get("eos_token_id", 2),
        pad_token_id=settings.get("pad_token_id", 0),
        architectures=["GlmForCausalLM"],
        dtype=raw.dtype,
    )
    config.name_or_path = str(raw.path)
    return config


def _rotary(ratio: float, second: bool) -> dict[str, Any]:
    """How `rope_ratio` stretches positions: ChatGLM2-6B-32K divides them by it, the others multiply the base by it."""
    parameters = {"rope_type": "default", "rope_theta": _ROTARY_BASE, "partial_rotary_factor": 0.5}
    if ratio == 1.0:
        return parameters
    if second:
        return parameters | {"rope_type": "linear", "factor": ratio}
    return parameters | {"rope_theta": _ROTARY_BASE * ratio}


def _layout(config: GlmConfig) -> Layout:
    queries = config.num_attention_heads * config.head_dim
    shared = config.num_key_value_heads * config.head_dim
    parts: dict[str, dict[str, int]] = {
        "transformer.embedding.word_embeddings.weight": {"model.embed_tokens.weight": 0},
        "transformer.encoder.final_layernorm.weight": {"model.norm.weight": 0},
    }
    if not config.tie_word_embeddings:
        parts["transformer.output_layer.weight"] = {"lm_head.weight": 0}
    for layer in range(config.num_hidden_layers):
        theirs, ours = f"transformer.encoder.layers.{layer}.", f"model.layers.{layer}."
        for kind in ("weight", "bias") if config.attention_bias else ("weight",):
            parts[f"{theirs}self_attention.query_key_value.{kind}"] = {
                f"{ours}self_attn.q_proj.{kind}": queries,
                f"{ours}self_attn.k_proj.{kind}": shared,
                f"{ours}self_attn.v_proj.{kind}": shared,
            }
        parts |= {
            f"{theirs}input_layernorm.weight": {f"{ours}input_layernorm.weight": 0},
            f"{theirs}self_attention.dense.weight": {f"{ours}self_attn.o_proj.weight": 0},
            f"{theirs}post_attention_layernorm.weight": {f"{ours}post_attention_layernorm.weight": 0},
            f"{theirs}mlp.dense_h_to_4h.weight": {f"{ours}mlp.gate_up_proj.weight": 0},
            f"{theirs}mlp.dense_4h_to_h.weight": {f"{ours}mlp.down_proj.weight": 0},
        }
    return Layout(parts, dropped=("rotary_pos_emb.inv_freq",))


def _generation_config(source: Source, config: GlmConfig, *, roles: bool) -> GenerationConfig:
    """What the folder says; ChatGLM3 also ends its answer where it hands the turn to the user or to a tool."""
    result = source.generation_config() or GenerationConfig(
        eos_token_id=config.eos_token_id, pad_token_id=config.pad_token_id
    )
    if roles and (source.path / "tokenizer.model").is_file():
        ends = result.eos_token_id if isinstance(result.eos_token_id, list) else [result.eos_token_id]
        stops = [stop for stop in turn_ends(source.path) if stop < config.vocab_size and stop not in ends]
        result.eos_token_id = [end for end in ends if end is not None] + stops
    return result
