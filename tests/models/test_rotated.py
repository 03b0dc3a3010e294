"""Layers that rotate what they are given: more accurate, stored so that only who rotates reads them."""

import json
from pathlib import Path

import pytest
import torch
import transformers
from tiny_folder import write_folder
from torch import Tensor

import fewbits
from fewbits.errors import FewbitsError
from fewbits.kernels.rotation import block_of
from fewbits.models.fused import unfuse
from fewbits.models.linear import QuantHead, QuantLinear
from fewbits.tensors.quantized import quantize_weight

OUTLIERS = [3, 17, 40]
IDS = torch.arange(40)[None] % 300
Auto = fewbits.AutoModelForCausalLM


@pytest.fixture(scope="module")
def outlying(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama whose layers are given three channels 10 times as large, and have small weights for them."""
    folder = tmp_path_factory.mktemp("outlying")
    write_folder(folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    for layer in model.model.layers:
        for norm in (layer.input_layernorm, layer.post_attention_layernorm):
            norm.weight.data[OUTLIERS] *= 10
        for module in (*layer.self_attn.children(), layer.mlp.gate_proj, layer.mlp.up_proj):
            if module is not layer.self_attn.o_proj:
                module.weight.data[:, OUTLIERS] /= 10
    model.save_pretrained(folder)
    return folder


def logits(model: torch.nn.Module) -> Tensor:
    with torch.no_grad():
        return model(IDS).logits


def error(model: torch.nn.Module, folder: Path) -> float:
    expected = logits(Auto.from_pretrained(folder, precision="fp32"))
    return ((logits(model) - expected).norm() / expected.norm()).item()


def linears(model: torch.nn.Module) -> dict[str, QuantLinear]:
    return {name: each for name, each in model.named_modules() if isinstance(each, QuantLinear)}


def test_outliers_cost_several_times_less(outlying: Path) -> None:
    rotated = error(Auto.from_pretrained(outlying, precision="int8"), outlying)
    assert rotated < 0.7 * error(Auto.from_pretrained(outlying, precision="int8", rotate=False), outlying)
    weight, x = torch.randn(32, 512), torch.randn(20, 512)
    x[:, OUTLIERS] *= 40
    errors = [
        (QuantLinear(quantize_weight(weight, "int8", rotation=block))(x) - x @ weight.T).norm() for block in (512, 0)
    ]
    assert errors[0] < errors[1] / 4


def test_layers_rotate_the_largest_block_that_fits(outlying: Path) -> None:
    model = Auto.from_pretrained(outlying, load_in_8bit=True)
    assert all(layer.rotation == block_of(layer.in_features) > 0 for layer in linears(model).values())
    assert f"rotated by {block_of(64)}" in repr(model.model.layers[0].self_attn.q_proj)


@pytest.mark.parametrize("precision", ["int8-weight", "nf4", "fp8"])
def test_where_nothing_is_gained_nothing_is_rotated(outlying: Path, precision: str) -> None:
    model = Auto.from_pretrained(outlying, precision=precision)
    assert not any(layer.rotation for layer in linears(model).values())


def test_the_fused_layer_rotates_like_the_modules(outlying: Path) -> None:
    model = Auto.from_pretrained(outlying, precision="int8")
    fused = logits(model)
    assert unfuse(model) > 0
    modules = logits(model)
    assert (fused - modules).norm() < 1e-2 * modules.norm()


def test_its_weights_stand_for_the_original_ones(outlying: Path) -> None:
    plain = transformers.AutoModelForCausalLM.from_pretrained(outlying, dtype=torch.float32)
    model = Auto.from_pretrained(outlying, precision="int8")
    for name, layer in linears(model).items():
        weight, values = plain.get_submodule(name).weight, layer.quantized_weight().dequantize()
        assert (values - weight).norm() < 0.01 * weight.norm(), name


def test_codes_that_are_stored_are_rotated_when_they_are_loaded(outlying: Path, tmp_path: Path) -> None:
    folder = fewbits.convert(outlying, tmp_path / "plain", "int8").path
    exact = Auto.from_pretrained(folder, rotate=False)
    assert not any(layer.rotation for layer in linears(exact).values())
    assert error(Auto.from_pretrained(folder), outlying) < 0.8 * error(exact, outlying)
    # 4 bits are too coarse to be rounded twice.
    folder = fewbits.convert(outlying, tmp_path / "plain4", "int4").path
    assert not any(each.rotation for each in linears(Auto.from_pretrained(folder)).values())


@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_stored_rotated_it_comes_back_bit_by_bit(outlying: Path, tmp_path: Path, precision: str) -> None:
    model = Auto.from_pretrained(outlying, precision=precision)
    folder = fewbits.convert(outlying, tmp_path / "converted", precision, rotate=True).path
    model.save_pretrained(tmp_path / "saved")
    for again in (folder, tmp_path / "saved"):
        assert torch.equal(logits(Auto.from_pretrained(again)), logits(model))
    back = fewbits.convert(folder, tmp_path / "back", "bf16").path
    values = Auto.from_pretrained(back, precision="fp32").model.layers[0].mlp.down_proj.weight
    layer = model.model.layers[0].mlp.down_proj
    assert torch.equal(values, layer.quantized_weight().dequantize().bfloat16().float())


def test_transformers_refuses_what_it_would_multiply_wrongly(outlying: Path, tmp_path: Path) -> None:
    folder = fewbits.convert(outlying, tmp_path / "rotated", "int8", rotate=True).path
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    assert config["quant_method"] == "fewbits"  # which transformers does not know unless fewbits is imported
    assert config["rotation"] == {"matrix": "hadamard", "largest_block": 512}


def test_bad_input(outlying: Path, tmp_path: Path) -> None:
    folder = fewbits.convert(outlying, tmp_path / "rotated", "int8", rotate=True).path
    with pytest.raises(FewbitsError, match=r"rotate=False: .* is stored with rotated weights"):
        Auto.from_pretrained(folder, rotate=False)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["rotation"] = {"matrix": "random"}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(FewbitsError, match=r"rotation: {'matrix': 'random'} is not"):
        Auto.from_pretrained(folder)
    with pytest.raises(FewbitsError, match="rotate: fp8 gains nothing by it"):
        fewbits.convert(outlying, tmp_path / "fp8", "fp8", rotate=True)
    with pytest.raises(FewbitsError, match="rotate: the layout bitsandbytes cannot say it"):
        fewbits.convert(outlying, tmp_path / "bnb", "int8", layout="bitsandbytes", rotate=True)
    with pytest.raises(FewbitsError, match="rotate: the layout gguf cannot say it"):
        fewbits.convert(outlying, tmp_path / "a.gguf", "int8", layout="gguf", rotate=True)


def test_gradients_pass_through_the_rotation(outlying: Path) -> None:
    model = Auto.from_pretrained(outlying, precision="int8")
    layer, x = model.model.layers[0].self_attn.q_proj, torch.randn(5, 64, requires_grad=True)
    layer(x).sum().backward()
    expected = layer.quantized_weight().dequantize().sum(0).expand(5, -1)
    torch.testing.assert_close(x.grad, expected, rtol=1e-4, atol=1e-4)
    assert isinstance(model.lm_head, QuantHead)
