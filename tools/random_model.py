"""Write a checkpoint with random weights in the shapes of a real model, shard by shard: something large to measure on.

    python tools/random_model.py llama-1.2b build/llama-1.2b --tokenizer build/smollm2-bf16
    python tools/random_model.py CHATGLM3_FOLDER build/chatglm3-6b --shards 7

The first argument is a name below, or a folder with the configuration (and tokenizer) of a ChatGLM model. The weights
are bfloat16 and normal with a standard deviation of 0.02; norms are 1.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
from pathlib import Path

import torch
from transformers import LlamaConfig

from fewbits.models.architecture import empty_model
from fewbits.models.load import AutoTokenizer
from fewbits.models.safetensors_writer import SafetensorsWriter

Shapes = dict[str, tuple[int, ...]]

CONFIGS = {
    "llama-1.2b": LlamaConfig(  # the shapes of Llama-3.2-1B
        vocab_size=49152,
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=16,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=64,
        tie_word_embeddings=True,
        architectures=["LlamaForCausalLM"],
        dtype="bfloat16",
    ),
    "llama-6.2b": LlamaConfig(  # the sizes of ChatGLM3-6B, in an architecture that every library runs
        vocab_size=65024,
        hidden_size=4096,
        intermediate_size=13696,
        num_hidden_layers=28,
        num_attention_heads=32,
        num_key_value_heads=2,
        head_dim=128,
        max_position_embeddings=8192,
        tie_word_embeddings=False,
        architectures=["LlamaForCausalLM"],
        dtype="bfloat16",
    ),
}


def main() -> None:
    """Parse, make the shapes, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help=f"a folder with a ChatGLM configuration, or one of {', '.join(CONFIGS)}")
    parser.add_argument("out", type=Path)
    parser.add_argument("--shards", type=int, default=2)
    parser.add_argument("--tokenizer", type=Path, help="a folder whose tokenizer goes beside the weights")
    options = parser.parse_args()
    options.out.mkdir(parents=True)
    if options.model in CONFIGS:
        config = CONFIGS[options.model]
        config.save_pretrained(options.out)
        model = empty_model(config, torch.bfloat16)
        tied = "lm_head.weight" if config.tie_word_embeddings else None
        shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items() if name != tied}
    else:
        for file in Path(options.model).iterdir():
            if file.is_file():
                shutil.copy(file, options.out)
        shapes = chatglm_shapes(json.loads((options.out / "config.json").read_text()))
    if options.tokenizer:
        AutoTokenizer.from_pretrained(options.tokenizer).save_pretrained(options.out)
    write(options.out, shapes, options.shards)


def chatglm_shapes(config: dict[str, int]) -> Shapes:
    """The tensors of a ChatGLM2 or ChatGLM3 checkpoint."""
    hidden, ffn, vocab = config["hidden_size"], config["ffn_hidden_size"], config["padded_vocab_size"]
    qkv = hidden + 2 * config["multi_query_group_num"] * config["kv_channels"]
    shapes: Shapes = {"transformer.embedding.word_embeddings.weight": (vocab, hidden)}
    for index in range(config["num_layers"]):
        layer = f"transformer.encoder.layers.{index}"
        shapes |= {
            f"{layer}.input_layernorm.weight": (hidden,),
            f"{layer}.self_attention.query_key_value.weight": (qkv, hidden),
            f"{layer}.self_attention.query_key_value.bias": (qkv,),
            f"{layer}.self_attention.dense.weight": (hidden, hidden),
            f"{layer}.post_attention_layernorm.weight": (hidden,),
            f"{layer}.mlp.dense_h_to_4h.weight": (2 * ffn, hidden),
            f"{layer}.mlp.dense_4h_to_h.weight": (hidden, ffn),
        }
    return shapes | {
        "transformer.encoder.final_layernorm.weight": (hidden,),
        "transformer.output_layer.weight": (vocab, hidden),
        "transformer.rotary_pos_emb.inv_freq": (config["kv_channels"] // 4,),
    }


def write(folder: Path, shapes: Shapes, shards: int) -> None:
    """Write the tensors in shards of about equal size, and the index."""
    total = sum(math.prod(shape) for shape in shapes.values()) * 2
    parts: list[Shapes] = [{}]
    size = 0
    for name, shape in shapes.items():
        if size > total / shards * len(parts):
            parts.append({})
        parts[-1][name] = shape
        size += math.prod(shape) * 2
    weight_map = {}
    for number, part in enumerate(parts, 1):
        file = f"model-{number:05}-of-{len(parts):05}.safetensors"
        with SafetensorsWriter(
            folder / file, ((name, torch.bfloat16, shape) for name, shape in part.items())
        ) as writer:
            for name, shape in part.items():
                writer.write(name, random_weight(name, shape))
                weight_map[name] = file
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1) + "\n")


def random_weight(name: str, shape: tuple[int, ...]) -> torch.Tensor:
    """A norm's ones, or noise of the usual size; the seed is of the name."""
    if len(shape) == 1 and "norm" in name:
        return torch.ones(shape, dtype=torch.bfloat16)
    generator = torch.Generator().manual_seed(sum(name.encode()))
    return torch.empty(shape, dtype=torch.bfloat16).normal_(0, 0.02, generator=generator)


if __name__ == "__main__":
    main()
