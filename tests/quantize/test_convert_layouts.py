"""Every precision in every layout of folders: converting is loading and saving, and codes survive another layout."""

import json
from collections.abc import Callable
from functools import partial
from itertools import permutations
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file

import fewbits
from fewbits.models.quantized_source import FOLDER_LAYOUTS, QuantizedSource, as_weights
from fewbits.models.source import open_source

IDS = torch.arange(3, 67).view(2, 32)
LAYOUTS = [(name, precision) for name, layout in FOLDER_LAYOUTS.items() for precision in layout.WRITES]
load = partial(fewbits.AutoModelForCausalLM.from_pretrained, rotate=False)  # codes as they are stored


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits


def opened(folder: Path) -> QuantizedSource:
    source = as_weights(open_source(folder))
    assert isinstance(source, QuantizedSource)
    return source


def same(first: QuantizedSource, second: QuantizedSource) -> bool:
    pairs = [(first.read_quantized(name), second.read_quantized(name)) for name in first.weights]
    codes = all(torch.equal(one.codes.view(torch.uint8), two.codes.view(torch.uint8)) for one, two in pairs)
    return codes and all(torch.equal(one.scales.float(), two.scales.float()) for one, two in pairs)


@pytest.mark.parametrize(("layout", "precision"), LAYOUTS)
def test_a_converted_folder_is_the_model_quantized_when_loaded(
    tiny: Path, tmp_path: Path, layout: str, precision: str
) -> None:
    folder = fewbits.convert(tiny, tmp_path / "out", precision, layout=layout).path
    source = opened(folder)
    assert (source.layout, source.precision.name) == (layout, precision)
    found, expected = load(folder), load(tiny, precision=precision)
    if FOLDER_LAYOUTS[layout].SCALES is None:  # else scales have more bits in the folder
        assert torch.equal(logits(found), logits(expected))
        found.save_pretrained(tmp_path / "saved")
        saved, converted = (load_file(each / "model.safetensors") for each in (tmp_path / "saved", folder))
        assert saved.keys() - {"lm_head.weight_scale"} == converted.keys()
    assert (logits(found) - logits(expected)).abs().mean() < 0.05 * logits(expected).std()


@pytest.mark.parametrize(("here", "there"), [*permutations(FOLDER_LAYOUTS, 2)])
def test_codes_survive_another_layout(tiny: Path, tmp_path: Path, here: str, there: str) -> None:
    first = fewbits.convert(tiny, tmp_path / "first", "int8", layout=here).path
    second = fewbits.convert(first, tmp_path / "second", "int8", layout=there).path
    assert opened(second).layout == there
    one, two = opened(first), opened(second)
    assert one.weights == two.weights
    for name in one.weights:
        assert torch.equal(one.read_quantized(name).codes, two.read_quantized(name).codes)
        scales = one.read_quantized(name).scales.float()
        assert ((two.read_quantized(name).scales.float() - scales).abs() <= 2**-23 * scales).all()
    if here == "compressed-tensors":  # its 16-bit scales survive both ways
        third = fewbits.convert(second, tmp_path / "third", "int8", layout=here).path
        assert same(one, opened(third))


@pytest.mark.parametrize("precision", FOLDER_LAYOUTS["compressed-tensors"].WRITES)
def test_experts_that_are_stored_one_by_one(save_tiny: Callable, tmp_path: Path, precision: str) -> None:
    save_tiny(tmp_path / "original")  # for its tokenizer
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = transformers.MixtralConfig(vocab_size=261, num_hidden_layers=1, num_local_experts=4, **sizes)
    transformers.MixtralForCausalLM(config).to(torch.bfloat16).save_pretrained(tmp_path / "original")
    folder = fewbits.convert(tmp_path / "original", tmp_path / "out", precision).path
    assert sum("experts" in name for name in opened(folder).weights) in (2, 12)
    assert torch.equal(logits(load(folder)), logits(load(tmp_path / "original", precision=precision)))


def test_a_conv1d_comes_back_as_the_model_has_it(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=261, n_embd=64, n_layer=1, n_head=4, bos_token_id=1, eos_token_id=2)
    transformers.GPT2LMHeadModel(config).to(torch.bfloat16).save_pretrained(tmp_path / "original")
    keep = ["*.attn.c_proj"]  # a square one, whose transpose would fit too
    codes = fewbits.convert(tmp_path / "original", tmp_path / "codes", keep=keep).path
    values = fewbits.convert(codes, tmp_path / "values", "fp32").path
    written, original = load_file(values / "model.safetensors"), load_file(tmp_path / "original" / "model.safetensors")
    for name, tensor in original.items():
        assert written[name].shape == tensor.shape
        assert (written[name] - tensor.float()).abs().max() <= 0.02 * tensor.float().abs().max() + 1e-9, name
    other = fewbits.convert(codes, tmp_path / "other", layout="bitsandbytes", keep=keep).path
    assert torch.equal(logits(load(other)), logits(load(codes)))
    skipped = json.loads((other / "config.json").read_text())["quantization_config"]["llm_int8_skip_modules"]
    assert "transformer.h.0.attn.c_proj" in skipped
