"""Checkpoints as others write them: every linear layer compressed by the compressed-tensors package itself."""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from compressed_tensors.quantization.utils import calculate_qparams
from safetensors.torch import load_file, save_file

DYNAMIC = {"num_bits": 8, "strategy": "token", "dynamic": True}


def write_compressed(
    source: Path, out: Path, format_name: str, weights: dict[str, Any], inputs: dict[str, Any] | None = None,
    scale_dtype: torch.dtype | None = None,
) -> dict[str, torch.Tensor]:  # fmt: skip
    """Write a folder whose layers have this scheme; return what the package dequantizes each weight to."""
    scheme = QuantizationScheme(
        targets=["Linear"],
        weights=QuantizationArgs(**weights),
        input_activations=None if inputs is None else QuantizationArgs(**inputs),
    )
    compressor = BaseCompressor.get_value_from_registry(format_name)
    stored: dict[str, torch.Tensor] = {}
    values: dict[str, torch.Tensor] = {}
    for name, tensor in load_file(source / "model.safetensors").items():
        if not name.endswith("_proj.weight"):
            stored[name] = tensor
            continue
        tensor = tensor.to(scale_dtype or tensor.dtype)
        scale, zero_point = calculate_qparams(*_extremes(tensor, scheme.weights), scheme.weights)
        module = {"weight": tensor, "weight_scale": scale.to(tensor.dtype), "weight_zero_point": zero_point}
        module = compressor.compress(module, scheme)
        values[name] = compressor.decompress(module, scheme)["weight"]
        prefix = name.removesuffix("weight")
        stored |= {f"{prefix}{key}": value.contiguous() for key, value in module.items()}
    shutil.copytree(source, out, ignore=shutil.ignore_patterns("*.safetensors"))
    save_file(stored, out / "model.safetensors", metadata={"format": "pt"})
    group = {"targets": ["Linear"], "weights": scheme.weights.model_dump(mode="json"), "input_activations": inputs}
    quantization = {
        "quant_method": "compressed-tensors",
        "format": format_name,
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
    }
    config = json.loads((source / "config.json").read_text())
    (out / "config.json").write_text(json.dumps(config | {"quantization_config": quantization}))
    return values


def _extremes(weight: torch.Tensor, args: QuantizationArgs) -> tuple[torch.Tensor, torch.Tensor]:
    """The least and the largest weight of whatever shares a scale."""
    N, K = weight.shape
    match str(args.strategy):
        case "tensor":
            return weight.min().reshape(1), weight.max().reshape(1)
        case "channel":
            return weight.amin(1, keepdim=True), weight.amax(1, keepdim=True)
        case "group":
            groups = weight.view(N, -1, args.group_size)
            return groups.amin(2), groups.amax(2)
        case _:
            rows, columns = args.block_structure
            padded = torch.nn.functional.pad(weight, (0, -K % columns, 0, -N % rows))
            blocks = padded.view(padded.shape[0] // rows, rows, -1, columns)
            return blocks.amin((1, 3)), blocks.amax((1, 3))
