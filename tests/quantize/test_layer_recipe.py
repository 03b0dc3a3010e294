"""Several precisions in one model: written as mixed-precision, read by transformers and by fewbits."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import fewbits
from fewbits.errors import FewbitsError
from fewbits.measure.memory import bits_per_weight
from fewbits.measure.subject import Subject
from fewbits.models.linear import QuantHead, QuantLinear
from fewbits.models.quantized_source import QuantizedSource, as_weights
from fewbits.models.source import open_source

RECIPE = {"*.down_proj": "int8-weight", "*.0.mlp.*": "mxfp4", "*.1.mlp.*": "fp8", "*.q_proj": "int8", "*": "int4"}
FORMATS = {"int8-weight": "int8", "mxfp4": "e2m1fn", "fp8": "e4m3fn", "int8": "int8", "int4": "int4"}
IDS = torch.arange(3, 67).view(2, 32)

load = fewbits.AutoModelForCausalLM.from_pretrained


LAYERS = {
    f"model.layers.{layer}.{part}_proj": name
    for layer, gate in enumerate(("mxfp4", "fp8"))
    for part, name in {
        "self_attn.q": "int8", "self_attn.k": "int4", "self_attn.v": "int4", "self_attn.o": "int4",
        "mlp.gate": gate, "mlp.up": gate, "mlp.down": "int8-weight",
    }.items()
}  # fmt: skip


def quantized_layers(model: torch.nn.Module) -> dict[str, QuantLinear]:
    return {name: module for name, module in model.named_modules() if type(module) is QuantLinear}


@pytest.fixture(scope="module")
def mixed(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fewbits.convert(tiny, tmp_path_factory.mktemp("mixed") / "out", RECIPE).path


def test_the_manifest_names_the_precision_of_each_layer(tiny: Path, tmp_path: Path) -> None:
    done = fewbits.convert(tiny, tmp_path / "out", RECIPE)
    assert done.precision == "int8-weight+mxfp4+fp8+int8+int4"
    assert {row.module: row.format for row in done.manifest if row.reason is None} == LAYERS
    assert done.nbytes == sum(row.nbytes for row in done.manifest)
    source = as_weights(open_source(tmp_path / "out"))
    assert isinstance(source, QuantizedSource)
    assert {name.removesuffix(".weight"): each.name for name, each in source.precisions.items()} == LAYERS
    assert Subject.of(tmp_path / "out").stored == "int4+int8-weight+mxfp4+fp8+int8"


def test_what_no_rule_names_is_kept(tiny: Path, tmp_path: Path) -> None:
    done = fewbits.convert(tiny, tmp_path / "out", {"*.0.*.q_proj": "int4", "*.o_proj": "int8"})
    kept = {row.module for row in done.manifest if row.reason == "no rule of the recipe names it"}
    assert {*LAYERS} - kept == {
        "model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.o_proj", "model.layers.1.self_attn.o_proj",
    }  # fmt: skip
    model = load(done.path)
    assert {*quantized_layers(model)} == {*LAYERS} - kept
    assert torch.isfinite(model(IDS).logits).all()


def test_each_layer_runs_in_its_own_precision(mixed: Path, tiny: Path) -> None:
    model = load(mixed)
    layers = quantized_layers(model)
    assert {name: layer.format for name, layer in layers.items()} == {n: FORMATS[p] for n, p in LAYERS.items()}
    activations = {name: layer.activations for name, layer in layers.items()}
    of = {"int8": "int8", "int8-weight": None, "int4": "int8", "mxfp4": None, "fp8": "e4m3fn"}
    assert activations == {name: of[precision] for name, precision in LAYERS.items()}
    assert isinstance(model.lm_head, QuantHead)
    reference = load(tiny, precision="fp32")
    with torch.no_grad():
        exact, found = reference(IDS).logits, model(IDS).logits
    assert 1e-4 < (found - exact).norm() / exact.norm() < 0.6


def test_bits_per_weight_are_those_of_the_layers(mixed: Path, tiny: Path, tmp_path: Path) -> None:
    single = {name: load(fewbits.convert(tiny, tmp_path / name, name).path) for name in FORMATS}
    parts = [quantized_layers(single[precision])[name].quantized_bits() for name, precision in LAYERS.items()]
    model = load(mixed)
    assert bits_per_weight(model) == pytest.approx(sum(bits for bits, _ in parts) / sum(count for _, count in parts))
    for name, precision in LAYERS.items():
        ours, alone = quantized_layers(model)[name], quantized_layers(single[precision])[name]
        assert torch.equal(ours.quantized_weight().dequantize(), alone.quantized_weight().dequantize()), name


def test_transformers_decompresses_to_our_weights(mixed: Path) -> None:
    theirs = transformers.AutoModelForCausalLM.from_pretrained(mixed, dtype=torch.bfloat16).eval()
    theirs(IDS)  # with the first call weights become what they stand for
    layers = quantized_layers(load(mixed, rotate=False))
    assert len(layers) == 14
    for name, layer in layers.items():
        product = layer.quantized_weight().dequantize().bfloat16()
        assert torch.equal(product, theirs.get_submodule(name).weight.data), name


def test_transformers_predicts_what_we_predict(mixed: Path, tiny: Path) -> None:
    theirs = transformers.AutoModelForCausalLM.from_pretrained(mixed, dtype=torch.bfloat16).eval()
    ours, original = load(mixed, rotate=False), load(tiny, precision="fp32")
    with torch.no_grad():  # it gives weights of mxfp4 in bfloat16 whatever dtype is asked for
        expected, found, exact = (model(IDS).logits.float() for model in (theirs, ours, original))
    assert (found - expected).norm() < 0.3 * (exact - expected).norm()


def test_the_configuration_names_layers_and_formats(mixed: Path) -> None:
    config = json.loads((mixed / "config.json").read_text())["quantization_config"]
    assert (config["format"], config["quant_method"]) == ("mixed-precision", "compressed-tensors")
    formats = {group["format"]: sorted(group["targets"]) for group in config["config_groups"].values()}
    assert formats["float-quantized"] == ["model.layers.1.mlp.gate_proj", "model.layers.1.mlp.up_proj"]
    targets = [target for group in config["config_groups"].values() for target in group["targets"]]
    assert sorted(targets) == sorted(LAYERS)
    assert config["ignore"] == ["lm_head"]


def test_a_rotated_mixture(tiny: Path, tmp_path: Path) -> None:
    folder = fewbits.convert(tiny, tmp_path / "out", RECIPE, rotate=True).path
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    assert config["quant_method"] == "fewbits"
    layers = quantized_layers(load(folder))
    assert {name for name, layer in layers.items() if layer.rotation} == {
        name for name, precision in LAYERS.items() if precision in ("int8", "int4")
    }
    with pytest.raises(FewbitsError, match="is stored with rotated weights"):
        load(folder, rotate=False)


def test_it_is_saved_and_loaded_again(mixed: Path, tmp_path: Path) -> None:
    model = load(mixed, rotate=False)
    model.save_pretrained(tmp_path / "again")
    again = load(tmp_path / "again", rotate=False)
    with torch.no_grad():
        assert torch.equal(model(IDS).logits, again(IDS).logits)


def test_a_recipe_of_one_precision_is_that_precision(tiny: Path, tmp_path: Path) -> None:
    fewbits.convert(tiny, tmp_path / "recipe", {"*": "int4"})
    fewbits.convert(tiny, tmp_path / "plain", "int4")
    for file in ("config.json", "model.safetensors"):
        assert (tmp_path / "recipe" / file).read_bytes() == (tmp_path / "plain" / file).read_bytes()


def test_it_is_calibrated(tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("\n".join(f"hello {n} hell {n * n} he'll {n % 7}" for n in range(2000)))
    recipe = {"*.mlp.*": "int4", "*": "int8-weight"}
    plain = fewbits.convert(tiny, tmp_path / "plain", recipe).path
    found = fewbits.convert(tiny, tmp_path / "gptq", recipe, calibrate=tmp_path / "text.txt").path
    ids = fewbits.AutoTokenizer.from_pretrained(tiny)("hello 12 hell 144 he'll 5" * 4, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        exact, one, two = (model(ids).logits for model in (load(tiny, precision="fp32"), load(plain), load(found)))
    assert (two - exact).norm() < (one - exact).norm()


def test_casts_read_a_mixture(mixed: Path, tmp_path: Path) -> None:
    done = fewbits.convert(mixed, tmp_path / "out", "bf16")
    assert (
        done.rounding == "weights were rounded to int4+int8-weight+mxfp4+fp8+int8 before and are rounded again, to bf16"
    )


@pytest.mark.parametrize(
    ("recipe", "options", "message"),
    [
        ({}, {}, "a recipe without rules quantizes nothing"),
        ({"*": "int5"}, {}, "precision 'int5' is unknown"),
        ({"*.mlp.*": "bf16", "*": "int8"}, {}, r"bf16 for '\*\.mlp\.\*' is a cast"),
        ({"*.nlp.*": "int4", "*": "int8"}, {}, r"to: the pattern '\*\.nlp\.\*' matches no linear layer; names look"),
        ({"*": "int4", "*.mlp.*": "int8"}, {}, r"to: all 6 layers of the pattern '\*\.mlp\.\*' have a precision"),
        ({"*": "nf4"}, {}, "nf4 cannot be written in the layout compressed-tensors"),
        ({"*": "int4"}, {"layout": "gguf"}, "to: a GGUF file has one type of matrices"),
        ({"*.mlp.*": "int4", "*": "int8"}, {"layout": "bitsandbytes"}, "int4 cannot be written in the layout bits"),
        ({"*.mlp.*": "mxfp4", "*": "fp8"}, {"rotate": True}, r"rotate: mxfp4\+fp8 gains nothing by it"),
    ],
)  # fmt: skip
def test_bad_recipes(tiny: Path, tmp_path: Path, recipe: dict, options: dict[str, Any], message: str) -> None:
    with pytest.raises(FewbitsError, match=message):
        fewbits.convert(tiny, tmp_path / "out", recipe, **options)
    assert not (tmp_path / "out").exists()


def test_it_is_loaded_as_it_is_stored(mixed: Path) -> None:
    with pytest.raises(FewbitsError, match=r"is stored in .*int4.* and cannot be loaded in int8"):
        load(mixed, precision="int8")


def test_a_mixture_already(mixed: Path, tmp_path: Path) -> None:
    with pytest.raises(FewbitsError, match=r"is int4\+int8-weight\+mxfp4\+fp8\+int8 already"):
        fewbits.convert(mixed, tmp_path / "out", RECIPE)
