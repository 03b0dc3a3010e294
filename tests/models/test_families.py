"""Every family that transformers carries: what is quantized, how far from its float self, saved and read again."""

import copy
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_families import FAMILIES, output
from torch import nn

import fewbits
from fewbits.errors import FewbitsError
from fewbits.models.experts import QuantExperts
from fewbits.models.linear import QuantHead, QuantLinear

Saved = Callable[..., Path]
EVERY = pytest.mark.parametrize("name", FAMILIES)
WEIGHTS = "model.safetensors"
EPS = torch.finfo(torch.float32).eps

BOUNDS = {"int8": 0.065, "int8-weight": 0.05, "int4": 0.45, "mxfp4": 0.5, "fp8": 0.2}
"""Largest error of the output as a whole, relative to it: two layers of random weights add little to one."""


@pytest.fixture(scope="module")
def in_int8(saved: Saved) -> Callable[[str], Any]:
    """A family's model in int8; do not change it."""
    loaded: dict[str, Any] = {}

    def load(name: str) -> Any:
        if name not in loaded:
            loaded[name] = FAMILIES[name].ours.from_pretrained(saved(name), precision="int8")
        return loaded[name]

    return load


def quantized(model: nn.Module) -> Iterator[tuple[str, Any]]:
    return ((name, each) for name, each in model.named_modules() if isinstance(each, (QuantLinear, QuantExperts)))


def dequantized(name: str, folder: Path, model: nn.Module) -> nn.Module:
    """The float model with the numbers that the quantized weights stand for."""
    plain = FAMILIES[name].ours.from_pretrained(folder, dtype=torch.float32)
    if (head := plain.get_output_embeddings()) is not None:  # which may be tied, and is quantized by itself
        plain.set_output_embeddings(copy.deepcopy(head))
    embeddings = {each for each in model.modules() if isinstance(each, nn.Embedding)}
    for path, module in model.named_modules():
        target = plain.get_submodule(path)
        if module in embeddings:
            target.weight.data = module.weight.float()
        elif isinstance(module, QuantExperts):
            for leaf in ("gate_up_proj", "down_proj"):
                experts = [module.quantized_weight(leaf, n).dequantize() for n in range(module.num_experts)]
                getattr(target, leaf).data = torch.stack(experts)
        elif isinstance(module, QuantLinear):
            values = module.quantized_weight().dequantize()
            target.weight.data = values if isinstance(target, nn.Linear) else values.T
    return plain


# --- what is quantized, and how well ------------------------------------------------------------------------------


@EVERY
def test_exactly_these_modules_are_quantized(in_int8: Callable, name: str) -> None:
    model, family = in_int8(name), FAMILIES[name]
    assert {path for path, _ in quantized(model)} == family.quantized
    heads = {path for path, module in model.named_modules() if isinstance(module, QuantHead)}
    assert heads == family.quantized & {"lm_head"}
    left = {path for path, module in model.named_modules() if type(module) is nn.Linear}
    routers = {path for path in family.kept if path.endswith("mlp.gate")}
    assert left == set(family.kept) - routers
    for path in family.kept:
        assert model.get_submodule(path).weight.dtype == torch.float32
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert not model.training


@EVERY
@pytest.mark.parametrize("precision", BOUNDS)
def test_the_error_is_small(saved: Saved, in_int8: Callable, name: str, precision: str) -> None:
    family = FAMILIES[name]
    expected = output(name, family.ours.from_pretrained(saved(name), precision="fp32"))
    load = in_int8 if precision == "int8" else lambda _: family.ours.from_pretrained(saved(name), precision=precision)
    got = output(name, load(name))
    assert got.dtype == torch.float32
    error = ((got - expected).norm() / expected.norm()).item()
    assert EPS < error <= BOUNDS[precision]


@EVERY
def test_weights_in_few_bits_are_those_numbers_and_no_others(saved: Saved, name: str) -> None:
    model = FAMILIES[name].ours.from_pretrained(saved(name), precision="nf4")
    expected = output(name, dequantized(name, saved(name), model))
    # The head's activations have 16 bits: half a step of 1/(127 · 254) of the largest.
    assert torch.allclose(output(name, model), expected, rtol=0, atol=2e-4 * expected.abs().max().item())


# --- saved and converted ------------------------------------------------------------------------------------------


@EVERY
def test_saved_and_loaded_again_it_is_the_same(in_int8: Callable, tmp_path: Path, name: str) -> None:
    model = in_int8(name)
    model.save_pretrained(tmp_path)
    again = FAMILIES[name].ours.from_pretrained(tmp_path)
    assert {path for path, _ in quantized(again)} == FAMILIES[name].quantized
    assert torch.equal(output(name, again), output(name, model))


@EVERY
def test_converted_it_is_the_same(saved: Saved, in_int8: Callable, tmp_path: Path, name: str) -> None:
    folder = fewbits.convert(saved(name), tmp_path / "int8", rotate=True).path
    again = FAMILIES[name].ours.from_pretrained(folder)
    assert {path for path, _ in quantized(again)} == FAMILIES[name].quantized
    assert torch.equal(output(name, again), output(name, in_int8(name)))


@pytest.mark.parametrize("precision", ["int8-weight", "int4", "fp8"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral"])
def test_other_precisions_saved_and_converted(saved: Saved, tmp_path: Path, name: str, precision: str) -> None:
    load = FAMILIES[name].ours.from_pretrained
    model = load(saved(name), precision=precision)
    model.save_pretrained(tmp_path / "saved")
    assert torch.equal(output(name, load(tmp_path / "saved")), output(name, model))
    fewbits.convert(saved(name), tmp_path / "converted", precision, rotate=precision == "int4")
    assert torch.equal(output(name, load(tmp_path / "converted")), output(name, model))


@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_what_is_stored_in_one_is_kept_in_one(saved: Saved, tmp_path: Path, precision: str) -> None:
    keep = ["layers.0.self_attn.k_proj"]  # the checkpoint has it in `Wqkv`, with two others
    model = fewbits.AutoModel.from_pretrained(saved("nomic-bert"), precision=precision, keep=keep)
    others = {f"layers.0.self_attn.{leaf}_proj" for leaf in "qkv"}
    assert {path for path, _ in quantized(model)} == FAMILIES["nomic-bert"].quantized - others
    folder = fewbits.convert(saved("nomic-bert"), tmp_path / "out", precision, keep=keep, rotate=True).path
    assert torch.equal(output("nomic-bert", fewbits.AutoModel.from_pretrained(folder)), output("nomic-bert", model))


# --- names of other times and places ------------------------------------------------------------------------------


def renamed(folder: Path, out: Path, rename: Callable[[str], str]) -> Path:
    """A copy of a checkpoint with other names."""
    shutil.copytree(folder, out)
    tensors = load_file(folder / WEIGHTS)
    other = {rename(name): tensor for name, tensor in tensors.items()}
    assert other.keys() != tensors.keys()
    save_file(other, out / WEIGHTS)
    return out


OTHER_NAMES: dict[str, tuple[str, Callable[[str], str]]] = {
    "gpt2 without prefix": ("gpt2", lambda name: name.removeprefix("transformer.")),
    "bloom without prefix": ("bloom", lambda name: name.removeprefix("transformer.")),
    "llama without prefix": ("llama", lambda name: name.removeprefix("model.")),
    "bert with prefix": ("bert", lambda name: f"bert.{name}"),
    "bert of old": (
        "bert",
        lambda name: f"bert.{name}".replace("Norm.weight", "Norm.gamma").replace("Norm.bias", "Norm.beta"),
    ),
    "classifier without prefix": ("bert-classifier", lambda name: name.removeprefix("bert.")),
}


@pytest.mark.parametrize("kind", OTHER_NAMES)
def test_names_of_other_times(saved: Saved, in_int8: Callable, tmp_path: Path, kind: str) -> None:
    name, rename = OTHER_NAMES[kind]
    folder, expected = renamed(saved(name), tmp_path / "model", rename), output(name, in_int8(name))
    load = FAMILIES[name].ours.from_pretrained
    assert torch.equal(output(name, load(folder, precision="int8")), expected)
    assert torch.equal(output(name, load(fewbits.convert(folder, tmp_path / "int8", rotate=True).path)), expected)
    plain = output(name, load(saved(name), precision="fp32"))
    assert torch.equal(output(name, load(folder, precision="fp32")), plain)


ON_THE_HUB = {
    "mixtral": "model.layers.1.block_sparse_moe.experts.3.w1.weight",
    "qwen2-moe": "model.layers.1.mlp.experts.3.gate_proj.weight",
    "qwen3-moe": "model.layers.1.mlp.experts.3.gate_proj.weight",
}


@pytest.mark.parametrize("name", ON_THE_HUB)
def test_experts_by_themselves_or_in_one_tensor(saved: Saved, in_int8: Callable, tmp_path: Path, name: str) -> None:
    assert ON_THE_HUB[name] in load_file(saved(name) / WEIGHTS)
    family = FAMILIES[name]
    fused = shutil.copytree(saved(name), tmp_path / "fused")
    tensors = family.ours.from_pretrained(saved(name), precision="fp32").state_dict()
    assert tensors["model.layers.1.mlp.experts.gate_up_proj"].ndim == 3
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, fused / WEIGHTS)
    expected = output(name, in_int8(name))
    assert torch.equal(output(name, family.ours.from_pretrained(fused, precision="int8")), expected)
    converted = fewbits.convert(fused, tmp_path / "int8", rotate=True).path
    assert torch.equal(output(name, family.ours.from_pretrained(converted)), expected)


@pytest.mark.parametrize("precision", ["int8", "int4", "int8-weight", "nf4", "mxfp4", "fp8"])
def test_a_missing_expert_is_refused(saved: Saved, tmp_path: Path, precision: str) -> None:
    folder = shutil.copytree(saved("mixtral"), tmp_path / "model")
    tensors = load_file(folder / WEIGHTS)
    del tensors["model.layers.1.block_sparse_moe.experts.2.w3.weight"]
    save_file(tensors, folder / WEIGHTS)
    with pytest.raises(
        FewbitsError, match=r"gate_up_proj cannot be made of 4 .*w1.weight and 3 .*w3.weight; download the"
    ):
        FAMILIES["mixtral"].ours.from_pretrained(folder, precision=precision)


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_an_expert_of_another_shape_is_refused(saved: Saved, tmp_path: Path, precision: str) -> None:
    folder = shutil.copytree(saved("mixtral"), tmp_path / "model")
    tensors = load_file(folder / WEIGHTS)
    tensors["model.layers.1.block_sparse_moe.experts.2.w3.weight"] = torch.ones(95, 64)
    save_file(tensors, folder / WEIGHTS)
    with pytest.raises(
        FewbitsError,
        match=r"block_sparse_moe.experts.2.w3.weight has shape \[95, 64\], those beside it have \[96, 64\]",
    ):
        FAMILIES["mixtral"].ours.from_pretrained(folder, precision=precision)


# --- heads for a task ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_a_head_that_the_checkpoint_lacks_is_new_and_in_float(saved: Saved, precision: str) -> None:
    load = fewbits.AutoModelForSequenceClassification.from_pretrained
    model, info = load(saved("bert"), precision=precision, num_labels=3, output_loading_info=True)
    assert info["missing_keys"] == {"classifier.weight", "classifier.bias"}
    assert type(model.classifier) is nn.Linear
    assert model.classifier.weight.shape == (3, 64)
    assert model.classifier.weight.isfinite().all()
    assert 0 < model.classifier.weight.std() < 0.1, "initialized as transformers does"
    assert output("bert", model).shape == (1, 3)


def test_a_new_head_beside_an_int8_folder(saved: Saved, tmp_path: Path) -> None:
    folder = fewbits.convert(saved("bert"), tmp_path / "int8", rotate=True).path
    model = fewbits.AutoModelForSequenceClassification.from_pretrained(folder, num_labels=5)
    assert isinstance(model.bert.encoder.layer[0].intermediate.dense, QuantLinear)
    assert output("bert", model).shape == (1, 5)


def test_a_language_model_without_its_head_is_refused(saved: Saved, tmp_path: Path) -> None:
    folder = shutil.copytree(saved("llama"), tmp_path / "model")
    tensors = load_file(folder / WEIGHTS)
    del tensors["lm_head.weight"]
    save_file(tensors, folder / WEIGHTS)
    with pytest.raises(FewbitsError, match=r"1 tensors of the model are not in the checkpoint, such as lm_head.weight"):
        FAMILIES["llama"].ours.from_pretrained(folder, precision="int8")


def test_a_model_without_the_head_that_the_checkpoint_has(saved: Saved) -> None:
    with pytest.warns(UserWarning, match="1 tensors have no place in LlamaModel and were left out, such as lm_head"):
        model = fewbits.AutoModel.from_pretrained(saved("llama"), precision="int8")
    assert output("llama", model).shape == (1, 32, 64)
