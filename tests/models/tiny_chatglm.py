"""A tiny ChatGLM with random weights under the published names, and where the original's files may lie."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

SHARED = Path(__file__).parents[3] / "shared/chatglm3"
needs_original = pytest.mark.skipif(not SHARED.is_dir(), reason=f"{SHARED} is absent: the original's logits")
CONFIG: dict[str, Any] = {
    "model_type": "chatglm",
    "architectures": ["ChatGLMModel"],
    "auto_map": {"AutoConfig": "configuration_chatglm.C", "AutoModel": "modeling_chatglm.M"},
    "add_bias_linear": False,
    "add_qkv_bias": True,
    "apply_residual_connection_post_layernorm": False,
    "ffn_hidden_size": 48,
    "hidden_size": 32,
    "kv_channels": 8,
    "layernorm_epsilon": 1e-5,
    "multi_query_attention": True,
    "multi_query_group_num": 2,
    "num_attention_heads": 4,
    "num_layers": 2,
    "original_rope": True,
    "padded_vocab_size": 384,
    "post_layer_norm": True,
    "rmsnorm": True,
    "seq_length": 64,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
    "eos_token_id": 2,
    "pad_token_id": 0,
}


def save(folder: Path, **changes: Any) -> dict[str, torch.Tensor]:
    """Write a tiny ChatGLM with random weights under the published names."""
    config = CONFIG | changes
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps({key: value for key, value in config.items() if value != "absent"}))
    # It would raise if it were run.
    for name in ("configuration", "modeling", "tokenization"):
        (folder / f"{name}_chatglm.py").write_text("raise SystemExit('remote code was run')")
    tensors = weights(config)
    save_file(tensors, folder / "model.safetensors")
    return tensors


def weights(config: dict[str, Any], device: str = "cpu") -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    hidden, wide, channels = config["hidden_size"], config["ffn_hidden_size"], config["kv_channels"]
    queries = config["num_attention_heads"] * channels
    fused = queries + 2 * config["multi_query_group_num"] * channels
    shapes = {
        "transformer.embedding.word_embeddings.weight": (config["padded_vocab_size"], hidden),
        "transformer.rotary_pos_emb.inv_freq": (channels // 4,),
        "transformer.encoder.final_layernorm.weight": (hidden,),
        "transformer.output_layer.weight": (config["padded_vocab_size"], hidden),
    }
    for layer in range(config["num_layers"]):
        names = {
            "input_layernorm.weight": (hidden,),
            "self_attention.query_key_value.weight": (fused, hidden),
            "self_attention.query_key_value.bias": (fused,),
            "self_attention.dense.weight": (hidden, queries),
            "post_attention_layernorm.weight": (hidden,),
            "mlp.dense_h_to_4h.weight": (2 * wide, hidden),
            "mlp.dense_4h_to_h.weight": (hidden, wide),
        }
        if not config["add_qkv_bias"]:
            names.pop("self_attention.query_key_value.bias")
        shapes |= {f"transformer.encoder.layers.{layer}.{name}": shape for name, shape in names.items()}
    return {name: torch.randn(shape, device=device) * 0.3 + ("layernorm" in name) for name, shape in shapes.items()}
