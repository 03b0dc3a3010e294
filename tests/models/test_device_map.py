"""Models spread over memory and disk by accelerate: the same results wherever a layer lies."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
from tiny_families import FAMILIES, agree, output

from fewbits.errors import FewbitsError
from fewbits.models.linear import QuantLinear

Saved = Callable[..., Path]
PARTS = ("embed_tokens", "layers.0", "layers.1", "norm", "rotary_emb")
IN_MEMORY = {**{f"model.{part}": "cpu" for part in PARTS}, "lm_head": "cpu"}
LAST_LAYER = IN_MEMORY | {"model.layers.1": "disk"}
EVERYTHING = {"": "disk"}
MAPS: dict[str, tuple[str, Any]] = {
    "last layer": ("llama", LAST_LAYER),
    "all": ("llama", EVERYTHING),
    "head": ("llama", IN_MEMORY | {"lm_head": "disk"}),
    "embedding": ("llama", IN_MEMORY | {"model.embed_tokens": "disk"}),
    "biases": ("qwen2", LAST_LAYER),
    "experts": ("mixtral", LAST_LAYER),
    "tied": ("gemma3", LAST_LAYER),
    "tied, all": ("gemma3", EVERYTHING),
    "Conv1D, tied, all": ("gpt2", EVERYTHING),
    "encoder and decoder": ("t5", EVERYTHING),
}
PRECISIONS = pytest.mark.parametrize("precision", ["fp32", "int8", "int4", "fp8"])


@PRECISIONS
@pytest.mark.parametrize("device_map", ["auto", "cpu", {"": "cpu"}, "sequential"], ids=str)
def test_all_in_memory(saved: Saved, precision: str, device_map: Any) -> None:
    load = FAMILIES["llama"].ours.from_pretrained
    model = load(saved("llama"), precision=precision, device_map=device_map)
    assert {parameter.device.type for parameter in model.parameters()} == {"cpu"}
    assert torch.equal(output("llama", model), output("llama", load(saved("llama"), precision=precision)))


@PRECISIONS
@pytest.mark.parametrize("kind", MAPS)
def test_some_on_disk(saved: Saved, tmp_path: Path, kind: str, precision: str) -> None:
    name, device_map = MAPS[kind]
    load = FAMILIES[name].ours.from_pretrained
    model = load(saved(name), precision=precision, device_map=device_map, offload_folder=tmp_path)
    expected = output(name, load(saved(name), precision=precision))
    assert agree(output(name, model), expected)
    assert agree(output(name, model), expected), "and once more, read again"


def test_what_is_on_disk_is_not_in_memory(saved: Saved, tmp_path: Path) -> None:
    load = FAMILIES["llama"].ours.from_pretrained
    model = load(saved("llama"), precision="int8", device_map=LAST_LAYER, offload_folder=tmp_path)
    output("llama", model)
    layers = [module for module in model.model.layers[1].modules() if isinstance(module, QuantLinear)]
    assert len(layers) == 7
    assert {layer.weight.device.type for layer in layers} == {"meta"}
    assert model.model.layers[0].mlp.up_proj.packed


def test_what_has_no_room_goes_to_disk(saved: Saved, tmp_path: Path) -> None:
    load = FAMILIES["llama"].ours.from_pretrained
    model = load(
        saved("llama"), precision="int8", device_map="auto", max_memory={"cpu": 150_000}, offload_folder=tmp_path
    )
    assert set(model.hf_device_map.values()) == {"cpu", "disk"}
    assert agree(output("llama", model), output("llama", load(saved("llama"), precision="int8")))


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_no_folder_to_offload_to(saved: Saved, precision: str) -> None:
    with pytest.raises(FewbitsError, match=r"offload_folder: the device map puts a part .* give offload_folder="):
        FAMILIES["llama"].ours.from_pretrained(saved("llama"), precision=precision, device_map=LAST_LAYER)


def test_the_whole_beside_parts_on_disk(saved: Saved, tmp_path: Path) -> None:
    device_map = {"": "cpu", "model.layers.1": "disk"}
    with pytest.raises(FewbitsError, match=r"device_map: '' \('cpu'\) stands for the whole .* name every part"):
        FAMILIES["llama"].ours.from_pretrained(saved("llama"), device_map=device_map, offload_folder=tmp_path)


@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral"])
def test_offloaded_by_accelerate_afterwards(saved: Saved, tmp_path: Path, name: str) -> None:
    load = FAMILIES[name].ours.from_pretrained
    expected = output(name, load(saved(name), precision="int8"))
    model = accelerate.cpu_offload(load(saved(name), precision="int8"), execution_device=torch.device("cpu"))
    assert agree(output(name, model), expected)


def test_what_is_not_in_memory_is_not_saved(saved: Saved, tmp_path: Path) -> None:
    model = FAMILIES["llama"].ours.from_pretrained(
        saved("llama"), precision="int8", device_map=LAST_LAYER, offload_folder=tmp_path / "offloaded"
    )
    with pytest.raises(FewbitsError, match=r"model.layers.1.*is not in memory, so the model cannot be saved; load it"):
        model.save_pretrained(tmp_path / "saved")
