"""Loading: in which precision a model comes into memory, and what is refused."""

import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch
from gguf import GGMLQuantizationType as T
from safetensors.torch import load_file, save_file
from tiny_gguf import TinyGguf
from transformers import AutoModelForCausalLM as Theirs

import fewbits
from fewbits.errors import FewbitsError
from fewbits.models.linear import QuantHead, QuantLinear
from fewbits.models.safetensors_writer import SafetensorsWriter
from fewbits.models.source import open_source

WEIGHTS = "model.safetensors"
IDS = torch.arange(3, 67).view(2, 32)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
load = partial(fewbits.AutoModelForCausalLM.from_pretrained, rotate=False)  # codes as they are stored


@pytest.fixture
def model(tiny: Path, tmp_path: Path) -> Path:
    """A copy of the tiny model, to change."""
    return shutil.copytree(tiny, tmp_path / "model")


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits


def change(folder: Path, **tensors: Any) -> None:
    """Replace tensors; None removes one. `__` stands for a dot."""
    named = {name.replace("__", "."): tensor for name, tensor in tensors.items()}
    merged = load_file(folder / WEIGHTS) | named
    save_file({name: tensor for name, tensor in merged.items() if tensor is not None}, folder / WEIGHTS)


def configure(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


MODELS = {
    "llama": ("llama", {}),
    "tied": ("llama", {"tie_word_embeddings": True}),
    "biases": ("qwen2", {}),
    "float32": ("llama", {"dtype": torch.float32}),
    "float16": ("qwen3", {"dtype": torch.float16}),
}


@pytest.mark.parametrize("kind", MODELS)
def test_int8_on_the_fly_is_the_converted_folder(save_tiny: Callable, tmp_path: Path, kind: str) -> None:
    architecture, changes = MODELS[kind]
    save_tiny(tmp_path / "model", architecture, **changes)
    fewbits.convert(tmp_path / "model", tmp_path / "int8")
    expected = logits(load(tmp_path / "int8"))
    assert torch.equal(logits(load(tmp_path / "model", precision="int8")), expected)
    assert torch.equal(logits(load(tmp_path / "model", load_in_8bit=True)), expected)
    assert not torch.equal(logits(load(tmp_path / "model", precision="fp32")), expected)


def test_int8_on_the_fly_is_the_converted_gguf(tmp_path: Path) -> None:
    gains = torch.linspace(0.5, 1.5, 64).numpy()  # no 16-bit float holds these
    TinyGguf(type=T.Q8_0, tensors={"output_norm.weight": gains}).write(tmp_path / "model.gguf")
    fewbits.convert(tmp_path / "model.gguf", tmp_path / "int8")
    assert torch.equal(logits(load(tmp_path / "model.gguf", precision="int8")), logits(load(tmp_path / "int8")))


@pytest.mark.parametrize("stored", ["float32", "bfloat16"])
def test_what_is_stored_wider_than_the_model_says(save_tiny: Callable, tmp_path: Path, stored: str) -> None:
    save_tiny(tmp_path / "model", "qwen2", dtype=torch.float32)
    configure(tmp_path / "model", dtype=stored)
    fewbits.convert(tmp_path / "model", tmp_path / "int8")
    assert torch.equal(logits(load(tmp_path / "model", precision="int8")), logits(load(tmp_path / "int8")))


def test_tensors_may_come_in_any_order(save_tiny: Callable, tmp_path: Path) -> None:
    save_tiny(tmp_path / "model", "qwen2", tie_word_embeddings=True)
    expected = logits(load(tmp_path / "model", precision="int8"))
    stored = dict(reversed(load_file(tmp_path / "model" / WEIGHTS).items()))
    (tmp_path / "model" / WEIGHTS).unlink()
    declared = [(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in stored.items()]
    with SafetensorsWriter(tmp_path / "model" / WEIGHTS, declared) as writer:
        for name, tensor in stored.items():
            writer.write(name, tensor)
    order = list(open_source(tmp_path / "model").tensors)
    weight, bias = (order.index(f"model.layers.0.self_attn.q_proj.{leaf}") for leaf in ("weight", "bias"))
    assert weight < bias, "a layer is made before its bias comes"
    assert torch.equal(logits(load(tmp_path / "model", precision="int8")), expected)


def test_int8_layers_stay_int8(tiny_int8: Path) -> None:
    model = load(tiny_int8)
    layers = [module for module in model.modules() if isinstance(module, QuantLinear)]
    assert len(layers) == 15
    assert [type(layer) for layer in layers].count(QuantHead) == 1
    assert type(model.lm_head) is QuantHead
    assert not any(type(module) is torch.nn.Linear for module in model.modules())
    assert model.model.embed_tokens.weight.dtype == torch.bfloat16
    assert model.model.norm.weight.dtype == torch.float32
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_int8_computes_in_the_dtype_asked_for(tiny_int8: Path, dtype: torch.dtype) -> None:
    model = load(tiny_int8, dtype=dtype)
    assert logits(model).dtype == dtype
    expected = logits(load(tiny_int8))
    assert (logits(model) - expected).abs().mean() < 0.05 * expected.std()


@pytest.mark.parametrize("precision", DTYPES)
@pytest.mark.parametrize("tie", [False, True], ids=["untied", "tied"])
def test_a_cast_gives_what_transformers_gives(save_tiny: Callable, tmp_path: Path, precision: str, tie: bool) -> None:
    save_tiny(tmp_path / "model", "qwen2", tie_word_embeddings=tie)
    ours, theirs = (
        load(tmp_path / "model", precision=precision),
        Theirs.from_pretrained(tmp_path / "model", dtype=DTYPES[precision]),
    )
    assert ours.dtype == DTYPES[precision]
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    assert all(torch.equal(tensor, ours.state_dict()[name]) for name, tensor in theirs.state_dict().items())
    assert (ours.lm_head.weight is ours.model.embed_tokens.weight) == tie
    assert torch.equal(logits(ours), logits(theirs))
    assert ours.generation_config.eos_token_id == theirs.generation_config.eos_token_id


def test_without_a_precision_a_model_comes_as_it_is_stored(tiny: Path, tiny_int8: Path) -> None:
    assert load(tiny).dtype == torch.bfloat16
    assert load(tiny, dtype=torch.float32).dtype == torch.float32
    assert isinstance(load(tiny_int8).model.layers[0].mlp.up_proj, QuantLinear)


def test_progress_ends_at_the_whole(tiny: Path) -> None:
    seen: list[tuple[int, int]] = []
    load(tiny, progress=lambda done, total: seen.append((done, total)))
    assert seen == sorted(seen)
    assert seen[-1] == (seen[0][1], sum(tensor.nbytes for tensor in load_file(tiny / WEIGHTS).values()))


# --- refused ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"precision": "int9"}, "precision 'int9' is unknown; did you mean int8"),
        ({"precision": "bfloat16"}, "precision 'bfloat16' is unknown; .*known: fp32, bf16"),
        ({"precision": ""}, "precision '' is unknown; known: fp32"),
        ({"precision": "bf16", "load_in_8bit": True}, r"load_in_8bit=True is precision='int8', but precision='bf16'"),
    ],
    ids=str,
)
def test_a_wrong_precision(tiny: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(FewbitsError, match=message):
        load(tiny, **options)


@pytest.mark.parametrize("precision", DTYPES)
def test_int8_is_not_loaded_as_something_else(tiny_int8: Path, precision: str) -> None:
    with pytest.raises(FewbitsError, match=f"is stored in int8 and cannot be loaded in {precision}; load the model it"):
        load(tiny_int8, precision=precision)


@pytest.mark.parametrize("precision", [None, "int8"])
@pytest.mark.parametrize(
    "name", ["model.layers.1.mlp.down_proj.weight", "model.norm.weight", "lm_head.weight", "model.embed_tokens.weight"]
)
def test_a_missing_tensor(model: Path, precision: str | None, name: str) -> None:
    change(model, **{name: None})
    with pytest.raises(FewbitsError, match=f"1 tensors of the model are not in the checkpoint, such as {name};"):
        load(model, precision=precision)


def test_a_missing_tensor_of_an_int8_folder(save_tiny: Callable, tmp_path: Path) -> None:
    save_tiny(tmp_path / "model", "qwen2")
    folder = fewbits.convert(tmp_path / "model", tmp_path / "int8").path
    change(folder, **{"model.layers.0.self_attn.q_proj.bias": None})
    with pytest.raises(FewbitsError, match=r"not in the checkpoint, such as model.layers.0.self_attn.q_proj.bias"):
        load(folder)


def test_missing_scales(tiny_int8: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_int8, tmp_path / "int8")
    change(folder, **{"model.layers.0.mlp.up_proj.weight_scale": None})
    with pytest.raises(FewbitsError, match=r"up_proj.weight is int8, but model.*up_proj.weight_scale is missing"):
        load(folder)


@pytest.mark.parametrize("shape", [(64, 1), (96,), (96, 2), (1, 1), ()], ids=str)
def test_scales_of_another_shape(tiny_int8: Path, tmp_path: Path, shape: tuple[int, ...]) -> None:
    folder = shutil.copytree(tiny_int8, tmp_path / "int8")
    change(folder, **{"model.layers.0.mlp.up_proj.weight_scale": torch.ones(shape, dtype=torch.bfloat16)})
    with pytest.raises(FewbitsError, match=r"up_proj.weight_scale has shape \[.*\], the codes want \[96, 1\]"):
        load(folder)


@pytest.mark.parametrize("precision", [None, "int8"])
def test_a_wrong_shape(model: Path, precision: str | None) -> None:
    change(model, model__norm__weight=torch.ones(63))
    with pytest.raises(FewbitsError, match=r"model.norm.weight has shape \[63\], the configuration wants \[64\]"):
        load(model, precision=precision)


@pytest.mark.parametrize("precision", [None, "int8"])
def test_an_unexpected_tensor_is_warned_of(model: Path, precision: str | None) -> None:
    expected = logits(load(model, precision=precision))
    change(model, model__mtp__weight=torch.ones(3, 4), model__norm__bias=torch.ones(64))
    with pytest.warns(UserWarning, match="2 tensors have no place in LlamaForCausalLM and were left out"):
        loaded = load(model, precision=precision)
    assert torch.equal(logits(loaded), expected)


def test_an_unexpected_layer_of_an_int8_folder_is_warned_of(tiny_int8: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_int8, tmp_path / "int8")
    change(folder, mtp__weight=torch.ones(3, 4, dtype=torch.int8), mtp__weight_scale=torch.ones(3, 1))
    with pytest.warns(UserWarning, match="1 tensors have no place"):
        load(folder)


def test_nan_is_refused_by_name(model: Path) -> None:
    weight = load_file(model / WEIGHTS)["lm_head.weight"]
    weight[9, 9] = torch.nan
    change(model, lm_head__weight=weight)
    with pytest.raises(FewbitsError, match=r"lm_head.weight: weight: NaN or Inf in output channel 9"):
        load(model, precision="int8")
    load(model)


def test_overflow_is_refused_by_name(model: Path) -> None:
    change(model, model__norm__weight=torch.full((64,), 1e5))
    with pytest.raises(FewbitsError, match=r"model.norm.weight: 100000 is beyond fp16, whose largest number is 65504"):
        load(model, precision="fp16")


@pytest.mark.parametrize("options", [{}, {"precision": "fp32"}, {"precision": "int8"}], ids=str)
def test_memory_that_does_not_suffice(tiny: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]) -> None:
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=100_000))
    with pytest.raises(FewbitsError, match=r"the weights take [\d.]+ GiB and [\d.]+ GiB of memory are free;"):
        load(tiny, **options)


def test_int8_fits_where_16_bits_do_not(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=150_000))
    with pytest.raises(FewbitsError, match="of memory are free"):
        load(tiny)
    load(tiny, precision="int8")


def test_an_encoder_is_refused(model: Path) -> None:
    configure(model, model_type="t5")
    with pytest.raises(FewbitsError, match="transformers has no causal language model of type 't5'; give a model that"):
        load(model)


def test_a_configuration_that_transformers_cannot_build_is_refused(model: Path) -> None:
    configure(model, hidden_act="surprise")
    with pytest.raises(FewbitsError, match=r"transformers cannot build the model: .*surprise"):
        load(model)
