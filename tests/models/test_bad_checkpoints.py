"""What is wrong with a checkpoint is said by name wherever its weights come from, and nothing is left half done."""

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_gguf import TinyGguf

import fewbits
from fewbits.errors import FewbitsError
from fewbits.models.source import open_source

SOURCES = ("safetensors", "shards", "bin", "old bin", "gguf")
LAYER = "model.layers.1.mlp.up_proj.weight"
GGUF_LAYER = "blk.1.ffn_up.weight"


def with_layer(tiny: Path, path: Path, kind: str, weight: torch.Tensor) -> Path:
    """A tiny model of this kind with one layer's weight replaced."""
    if kind == "gguf":
        TinyGguf(tensors={GGUF_LAYER: weight.float().numpy()}).write(path.with_suffix(".gguf"))
        return path.with_suffix(".gguf")
    shutil.copytree(tiny, path)
    tensors = load_file(path / "model.safetensors") | {LAYER: weight.bfloat16()}
    write_weights(path, kind, tensors)
    return path


def write_weights(path: Path, kind: str, tensors: dict[str, torch.Tensor]) -> None:
    (path / "model.safetensors").unlink()
    if kind == "safetensors":
        save_file(tensors, path / "model.safetensors")
    elif kind == "shards":
        names = list(tensors)
        for number, half in enumerate((names[::2], names[1::2])):
            save_file({name: tensors[name] for name in half}, path / f"{number}.safetensors")
        shards = {name: f"{number % 2}.safetensors" for number, name in enumerate(names)}
        (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))
    else:
        torch.save(tensors, path / "pytorch_model.bin", _use_new_zipfile_serialization=kind == "bin")


def random_weight() -> torch.Tensor:
    return torch.randn(96, 64, generator=torch.Generator().manual_seed(0))


@pytest.fixture(params=SOURCES)
def make(request: pytest.FixtureRequest, tiny: Path, tmp_path: Path) -> Callable[[torch.Tensor], Path]:
    return lambda weight: with_layer(tiny, tmp_path / "model", request.param, weight)


def refusals(model: Path, out: Path, message: str) -> None:
    """Converting and loading both say so, and leave nothing."""
    with pytest.raises(FewbitsError, match=message) as caught:
        fewbits.convert(model, out)
    assert "\n" not in str(caught.value)
    assert [path for path in out.parent.iterdir() if path != model] == []
    with pytest.raises(FewbitsError, match=message):
        fewbits.AutoModelForCausalLM.from_pretrained(model, precision="int8")


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_nan_and_inf_are_named(make: Callable[[torch.Tensor], Path], tmp_path: Path, bad: float) -> None:
    weight = random_weight()
    weight[7, 3] = bad
    refusals(make(weight), tmp_path / "out", rf"{LAYER}: .*NaN or Inf in output channel 7")


def test_a_wrong_shape_is_named(make: Callable[[torch.Tensor], Path], tmp_path: Path) -> None:
    asks = r"(the configuration wants|but the metadata asks for) \[96, 64\]"
    refusals(make(random_weight()[:95]), tmp_path / "out", rf"({LAYER}|{GGUF_LAYER})'? has shape \[95, 64\], {asks}")


def test_zero_rows_give_finite_results(make: Callable[[torch.Tensor], Path], tmp_path: Path) -> None:
    weight = random_weight()
    weight[[0, 41]] = 0
    model = make(weight)
    written = load_file(fewbits.convert(model, tmp_path / "int8").path / "model.safetensors")
    assert written[f"{LAYER}_scale"].isfinite().all()
    assert (written[f"{LAYER}_scale"] > 0).all()
    assert not written[LAYER][[0, 41]].any()
    for path in (model, tmp_path / "int8"):
        loaded = fewbits.AutoModelForCausalLM.from_pretrained(path, precision="int8")
        with torch.no_grad():
            assert loaded(torch.arange(3, 35)[None]).logits.isfinite().all()


# A name is never a path: of a tensor no more than of a shard.
EVIL = ("../evil", "/tmp/evil/../x", "..", "", "a\0b", "model/../../evil.weight")


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_names_that_look_like_paths_write_nowhere(tiny: Path, tmp_path: Path, kind: str) -> None:
    model = shutil.copytree(tiny, tmp_path / "a/b/model")
    tensors = load_file(model / "model.safetensors") | {name: torch.ones(2) for name in EVIL}
    write_weights(model, kind, tensors)
    source = open_source(model)
    assert all(source.read(name).tolist() == [1, 1] for name in EVIL)
    with pytest.raises(FewbitsError, match=r"has no tensor '../config.json'"):
        source.read("../config.json")
    before = sorted(tmp_path.rglob("*"))
    with pytest.warns(UserWarning, match=f"{len(EVIL)} tensors have no place"):
        fewbits.AutoModelForCausalLM.from_pretrained(model)
    fewbits.convert(model, tmp_path / "a/b/out")
    assert [
        path for path in sorted(tmp_path.rglob("*")) if (tmp_path / "a/b/out") not in (path, *path.parents)
    ] == before


def test_names_in_a_gguf_that_look_like_paths_are_refused(tmp_path: Path) -> None:
    TinyGguf(tensors={"../evil": np.ones(3, np.float32)}).write(tmp_path / "bad.gguf")
    with pytest.raises(FewbitsError, match=r"tensor '../evil' is no parameter of a llama model"):
        _ = open_source(tmp_path / "bad.gguf").tensors


@pytest.mark.parametrize("kind", ["bin", "old bin"])
def test_a_missing_tensor_is_named(tiny: Path, tmp_path: Path, kind: str) -> None:
    model = shutil.copytree(tiny, tmp_path / "model")
    tensors = load_file(model / "model.safetensors")
    del tensors[LAYER]
    write_weights(model, kind, tensors)
    refusals(model, tmp_path / "out", f"1 tensors of the model are not in the checkpoint, such as {LAYER}")


@pytest.mark.parametrize("dtype", [torch.int8, torch.int64, torch.bool, torch.complex64])
@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_a_layer_of_a_wrong_dtype_is_named(tiny: Path, tmp_path: Path, kind: str, dtype: torch.dtype) -> None:
    model = shutil.copytree(tiny, tmp_path / "model")
    tensors = load_file(model / "model.safetensors")
    write_weights(model, kind, tensors | {LAYER: tensors[LAYER].to(dtype)})
    refusals(model, tmp_path / "out", rf"{LAYER}: weight: float \[N, K\] .* is needed, got {dtype}")


def header(entries: dict[str, Any], data: bytes) -> bytes:
    text = json.dumps(entries).encode()
    return struct.pack("<Q", len(text)) + text + data


def test_a_header_that_lies_ends_a_conversion_before_it_begins(tiny: Path, tmp_path: Path) -> None:
    model = shutil.copytree(tiny, tmp_path / "model")
    raw = (model / "model.safetensors").read_bytes()
    length = int.from_bytes(raw[:8], "little")
    entries = json.loads(raw[8 : 8 + length])
    entries[LAYER]["data_offsets"] = [offset + 2 for offset in entries[LAYER]["data_offsets"]]
    (model / "model.safetensors").write_bytes(header(entries, raw[8 + length :]))
    refusals(model, tmp_path / "out", r"model.safetensors: byte \d+: tensor .* begins at byte \d+, not where the one")
