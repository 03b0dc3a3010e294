"""Checkpoints that the compressed-tensors package compressed itself are read with exactly its values."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peer_compressed import DYNAMIC, write_compressed
from safetensors.torch import load_file, save_file

import fewbits
from fewbits.models.linear import QuantLinear
from fewbits.models.quantized_source import DequantizedSource, QuantizedSource, as_weights
from fewbits.models.source import open_source
from fewbits.tensors.quantized import quantize_weight

GROUP = {"num_bits": 4, "strategy": "group", "group_size": 32}
CHANNEL = {"strategy": "channel"}
FP8 = {"num_bits": 8, "type": "float"}
CODES: dict[str, tuple[str, dict[str, Any], dict[str, Any] | None, str, int | None]] = {
    "int4, groups": ("pack-quantized", GROUP, None, "int4", 32),
    "int4, smaller groups": ("pack-quantized", {**GROUP, "group_size": 16}, None, "int4", 16),
    "int4, channels": ("pack-quantized", {"num_bits": 4, **CHANNEL}, None, "int4", None),
    "int4, one scale": ("pack-quantized", {"num_bits": 4, "strategy": "tensor"}, None, "int4", None),
    "int4, bytes": ("int-quantized", GROUP, None, "int4", 32),
    "int8, groups": ("pack-quantized", {**GROUP, "num_bits": 8}, None, "int8-weight", 32),
    "int8, channels": ("pack-quantized", {"num_bits": 8, **CHANNEL}, None, "int8-weight", None),
    "int8, bytes": ("int-quantized", {"num_bits": 8, **CHANNEL}, None, "int8-weight", None),
    "int8 activations": ("int-quantized", {"num_bits": 8, **CHANNEL}, DYNAMIC, "int8", None),
    "int8 activations, naive": ("naive-quantized", {"num_bits": 8, **CHANNEL}, DYNAMIC, "int8", None),
    "fp8": ("float-quantized", {**FP8, **CHANNEL}, {**DYNAMIC, "type": "float"}, "fp8", None),
    "fp8, one scale": ("float-quantized", {**FP8, "strategy": "tensor"}, {**DYNAMIC, "type": "float"}, "fp8", None),
}
VALUES: dict[str, tuple[str, dict[str, Any], dict[str, Any] | None]] = {
    "int4, asymmetric groups": ("pack-quantized", {**GROUP, "symmetric": False}, None),
    "int4, asymmetric channels": ("pack-quantized", {"num_bits": 4, **CHANNEL, "symmetric": False}, None),
    "int8, asymmetric groups": ("pack-quantized", {**GROUP, "num_bits": 8, "symmetric": False}, None),
    "int8, asymmetric bytes": ("int-quantized", {"num_bits": 8, **CHANNEL, "symmetric": False}, DYNAMIC),
    "fp8 weights only": ("float-quantized", {**FP8, **CHANNEL}, None),
    "fp8, blocks": ("float-quantized", {**FP8, "strategy": "block", "block_structure": [16, 32]}, None),
    "fp8, blocks that do not fit": ("float-quantized", {**FP8, "strategy": "block", "block_structure": [40, 24]}, None),
}
SCALES = [None, torch.float32, torch.float16]


def same(found: torch.Tensor, expected: torch.Tensor) -> bool:
    return torch.equal(found.to(expected.dtype), expected)


@pytest.mark.parametrize("scale_dtype", SCALES, ids=str)
@pytest.mark.parametrize("kind", CODES)
def test_codes_and_scales_are_taken_over(tiny: Path, tmp_path: Path, kind: str, scale_dtype: torch.dtype) -> None:
    format_name, weights, inputs, precision, group_size = CODES[kind]
    expected = write_compressed(tiny, tmp_path / "theirs", format_name, weights, inputs, scale_dtype)
    source = as_weights(open_source(tmp_path / "theirs"))
    assert isinstance(source, QuantizedSource)
    assert (source.precision.name, source.precision.group_size) == (precision, group_size)
    assert source.scale_dtype == (scale_dtype or torch.bfloat16)
    assert source.weights.keys() == expected.keys()
    for name, values in expected.items():
        assert same(source.read_quantized(name).dequantize(), values), name
        assert same(source.read_rows(name, 3, 7), values[3:7]), name
        assert source.tensors[name].shape == values.shape
    model = fewbits.AutoModelForCausalLM.from_pretrained(tmp_path / "theirs", rotate=False)
    for name, values in expected.items():
        layer = model.get_submodule(name.removesuffix(".weight"))
        assert isinstance(layer, QuantLinear)
        assert same(layer.quantized_weight().dequantize(), values), name
    with torch.no_grad():
        assert model(torch.arange(8)[None]).logits.isfinite().all()
    model.save_pretrained(tmp_path / "again")
    again = as_weights(open_source(tmp_path / "again"))
    assert isinstance(again, QuantizedSource)
    assert (again.precision, again.scale_dtype) == (source.precision, source.scale_dtype)
    assert all(same(again.read(name), values) for name, values in expected.items())


def test_an_embedding_with_codes_is_read_as_its_values(tiny: Path, tmp_path: Path) -> None:
    write_compressed(tiny, tmp_path / "theirs", "int-quantized", {"num_bits": 8, **CHANNEL}, DYNAMIC)
    stored, name = load_file(tmp_path / "theirs" / "model.safetensors"), "model.embed_tokens.weight"
    weight = quantize_weight(stored[name], "int8", scale_dtype=torch.bfloat16)
    changed = stored | {name: weight.codes, f"{name}_scale": weight.scales}
    save_file(changed, tmp_path / "theirs" / "model.safetensors")
    model = fewbits.AutoModelForCausalLM.from_pretrained(tmp_path / "theirs")
    assert torch.equal(model.model.embed_tokens.weight, weight.dequantize().bfloat16())
    assert isinstance(model.model.layers[0].mlp.up_proj, QuantLinear)


@pytest.mark.parametrize("scale_dtype", SCALES, ids=str)
@pytest.mark.parametrize("kind", VALUES)
def test_other_schemes_are_read_as_values(tiny: Path, tmp_path: Path, kind: str, scale_dtype: torch.dtype) -> None:
    format_name, weights, inputs = VALUES[kind]
    expected = write_compressed(tiny, tmp_path / "theirs", format_name, weights, inputs, scale_dtype)
    with pytest.warns(UserWarning, match=r"theirs: 14 weights, such as model.*_proj.weight, are of another scheme"):
        source = as_weights(open_source(tmp_path / "theirs"))
    assert type(source) is DequantizedSource
    assert as_weights(source) is source
    for name, values in expected.items():
        found = source.read(name)
        assert found.dtype == values.dtype
        assert torch.equal(found, values), name
        assert torch.equal(source.read_rows(name, 3, 7), values[3:7]), name
    with pytest.warns(UserWarning, match="are of another scheme"):
        model = fewbits.AutoModelForCausalLM.from_pretrained(tmp_path / "theirs", precision="fp32")
    assert all(torch.equal(model.get_parameter(name).data, values.float()) for name, values in expected.items())
    with pytest.warns(UserWarning, match="are of another scheme"):
        int8 = fewbits.AutoModelForCausalLM.from_pretrained(tmp_path / "theirs", load_in_8bit=True)
    assert isinstance(int8.model.layers[0].mlp.up_proj, QuantLinear)
