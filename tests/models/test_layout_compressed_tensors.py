"""The compressed-tensors layout: what is written is what the specification says, and what transformers reads."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors import safe_open
from transformers import CompressedTensorsConfig

import fewbits
from fewbits.models.linear import QuantLinear

MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama, float32": ("llama", {"dtype": torch.float32}),
    "llama, tied": ("llama", {"tie_word_embeddings": True}),
    "qwen2, biases": ("qwen2", {}),
    "qwen2, biases, tied": ("qwen2", {"tie_word_embeddings": True}),
    "qwen3, odd sizes": ("qwen3", {"intermediate_size": 97}),
}
IDS = torch.arange(3, 67).view(2, 32)


@pytest.fixture(scope="module", params=MODELS)
def folders(
    request: pytest.FixtureRequest, save_tiny: Callable, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Path]:
    """A model, and the same in int8."""
    folder = tmp_path_factory.mktemp("layout")
    architecture, changes = MODELS[request.param]
    save_tiny(folder / "original", architecture, **changes)
    return folder / "original", fewbits.convert(folder / "original", folder / "int8").path


def read(folder: Path) -> dict[str, torch.Tensor]:
    with safe_open(folder / "model.safetensors", "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def test_tensors_are_as_specified(folders: tuple[Path, Path]) -> None:
    original, converted = map(read, folders)
    linear = {name for name in original if name.endswith("_proj.weight")}
    assert len(linear) == 14
    assert converted.keys() == original.keys() | {f"{name}_scale" for name in linear}
    for name, tensor in original.items():
        if name in linear:
            codes, scales = converted[name], converted[f"{name}_scale"]
            assert (codes.dtype, codes.shape) == (torch.int8, tensor.shape)
            assert (scales.dtype, scales.shape) == (tensor.dtype, (tensor.shape[0], 1))
            assert ((codes.float() * scales.float() - tensor.float()).abs() <= scales.float() * 0.5001).all()
        else:
            assert converted[name].dtype == tensor.dtype
            assert torch.equal(converted[name], tensor)


def test_the_configuration_is_as_specified(folders: tuple[Path, Path]) -> None:
    config = json.loads((folders[1] / "config.json").read_text())
    weights = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel", "dynamic": False}
    weights["group_size"] = None
    group = {
        "targets": ["Linear"],
        "weights": weights,
        "input_activations": weights | {"strategy": "token", "dynamic": True},
        "output_activations": None,
    }
    assert config.pop("quantization_config") == {
        "quant_method": "compressed-tensors",
        "format": "int-quantized",
        "quantization_status": "compressed",
        "version": "0.15.0",
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
    }
    assert config == json.loads((folders[0] / "config.json").read_text())


@pytest.mark.filterwarnings("ignore:You passed `quantization_config`:UserWarning:transformers")  # as documented
def test_transformers_dequantizes_to_our_weights(folders: tuple[Path, Path]) -> None:
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        folders[1], quantization_config=CompressedTensorsConfig(dequantize=True), dtype=torch.float32
    )
    ours = fewbits.AutoModelForCausalLM.from_pretrained(folders[1], rotate=False)
    layers = {name: module for name, module in ours.named_modules() if isinstance(module, QuantLinear)}
    assert len(layers) == 15
    dtype = read(folders[1])["model.layers.0.mlp.up_proj.weight_scale"].dtype
    for name, layer in layers.items():
        if name != "lm_head":  # quantized in memory only
            dense = theirs.get_submodule(name)
            assert dense.weight.dtype == torch.float32
            product = layer.quantized_weight().dequantize().to(dtype).float()  # theirs is rounded to the scales' dtype
            assert torch.equal(product, dense.weight.data), name
            assert (layer.bias is None) == (dense.bias is None)
            assert layer.bias is None or torch.equal(layer.bias, dense.bias.data), name


def test_transformers_predicts_what_we_predict(folders: tuple[Path, Path]) -> None:
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folders[1], dtype=torch.float32).eval()
    ours = fewbits.AutoModelForCausalLM.from_pretrained(folders[1], rotate=False)
    original = fewbits.AutoModelForCausalLM.from_pretrained(folders[0], precision="fp32")
    with torch.no_grad():
        expected, found, exact = (model(IDS).logits for model in (theirs, ours, original))
    spread = exact.std()
    for model in (found, expected):
        assert 1e-4 * spread < (model - exact).abs().mean() < 0.05 * spread
    assert (found - expected).abs().mean() < 0.05 * spread  # activations are rounded with another scale: amax / 127.5
