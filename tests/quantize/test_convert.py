"""Conversions: what is written, from what, and what the manifest says about it."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import fewbits
from fewbits.models.architecture import empty_model
from fewbits.models.safetensors_writer import SafetensorsWriter
from fewbits.models.source import open_source
from models.tiny_gguf import TinyGguf, tiny_config

WEIGHTS = "model.safetensors"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def read(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / WEIGHTS)


@pytest.mark.parametrize("to", DTYPES)
def test_a_cast_casts_every_tensor(tiny: Path, tmp_path: Path, to: str) -> None:
    done = fewbits.convert(tiny, tmp_path / "out", to)
    assert {row.format for row in done.manifest} == {to}
    assert all(row.reason is None for row in done.manifest)
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["dtype"] == str(DTYPES[to]).removeprefix("torch.")
    assert "quantization_config" not in config
    original, written = read(tiny), read(tmp_path / "out")
    assert written.keys() == original.keys()
    for name, tensor in original.items():
        assert torch.equal(written[name], tensor.to(DTYPES[to])), name
        assert written[name].dtype == DTYPES[to]


def test_a_folder_is_complete(tiny: Path, tiny_int8: Path) -> None:
    names = {path.name for path in tiny_int8.iterdir()}
    assert names >= {path.name for path in tiny.iterdir()} | {"fewbits.json"}
    text = "hello <|user|> he"
    assert fewbits.AutoTokenizer.from_pretrained(tiny_int8)(text) == fewbits.AutoTokenizer.from_pretrained(tiny)(text)
    template = fewbits.AutoTokenizer.from_pretrained(tiny).chat_template
    assert template
    assert fewbits.AutoTokenizer.from_pretrained(tiny_int8).chat_template == template
    generation = open_source(tiny_int8).generation_config()
    assert generation is not None
    assert generation.eos_token_id == open_source(tiny).generation_config().eos_token_id
    assert list(tiny_int8.parent.glob(".*")) == []


def test_the_manifest_counts_what_is_written(tiny: Path, tmp_path: Path) -> None:
    done = fewbits.convert(tiny, tmp_path / "out")
    mark = json.loads((tmp_path / "out/fewbits.json").read_text())
    assert mark["source"] == tiny.name
    assert mark["to"] == done.precision == "int8"
    assert mark["nbytes"] == done.nbytes == sum(tensor.nbytes for tensor in read(tmp_path / "out").values())
    assert [row["tensor"] for row in mark["manifest"]] == [row.tensor for row in done.manifest]
    assert {row.tensor for row in done.manifest} == read(tiny).keys()


def test_the_manifest_comes_first_and_progress_ends_at_the_whole(tiny: Path, tmp_path: Path) -> None:
    seen = []
    done = fewbits.convert(
        tiny, tmp_path / "out", on_manifest=seen.append, progress=lambda done, total: seen.append((done, total))
    )
    assert tuple(seen[0]) == done.manifest
    assert seen[1:] == sorted(seen[1:])
    assert len(seen) == 1 + len(done.manifest)
    assert seen[-1] == (done.nbytes, done.nbytes)


def test_kept_layers_are_stored_as_they_were(tiny: Path, tmp_path: Path) -> None:
    done = fewbits.convert(tiny, tmp_path / "out", keep=["*.down_proj", "model.layers.0.self_attn.q_proj"])
    kept = {row.module: row.reason for row in done.manifest if row.reason and row.reason.startswith("kept by")}
    assert kept == {
        "model.layers.0.mlp.down_proj": "kept by '*.down_proj'",
        "model.layers.1.mlp.down_proj": "kept by '*.down_proj'",
        "model.layers.0.self_attn.q_proj": "kept by 'model.layers.0.self_attn.q_proj'",
    }
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert set(config["quantization_config"]["ignore"]) == kept.keys() | {"lm_head"}
    written = read(tmp_path / "out")
    for module in kept:
        assert torch.equal(written[f"{module}.weight"], read(tiny)[f"{module}.weight"])
    model = fewbits.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    for module in kept:
        assert type(model.get_submodule(module)) is torch.nn.Linear


def test_a_gguf_file_is_converted_like_the_folder_that_it_stands_for(tmp_path: Path) -> None:
    tensors = TinyGguf().write(tmp_path / "tiny.gguf")
    fewbits.convert(tmp_path / "tiny.gguf", tmp_path / "a")
    (tmp_path / "folder").mkdir()
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, tmp_path / "folder" / WEIGHTS)
    for file in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tmp_path / "a" / file, tmp_path / "folder")
    config = json.loads((tmp_path / "folder/config.json").read_text())
    del config["quantization_config"]
    (tmp_path / "folder/config.json").write_text(json.dumps(config))
    fewbits.convert(tmp_path / "folder", tmp_path / "b")
    a, b = read(tmp_path / "a"), read(tmp_path / "b")
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_shards_are_read(save_tiny: Callable, tiny: Path, tmp_path: Path) -> None:
    model = save_tiny(tmp_path / "shards")
    (tmp_path / "shards" / WEIGHTS).unlink()
    model.save_pretrained(tmp_path / "shards", max_shard_size="50KB")
    assert not (tmp_path / "shards" / WEIGHTS).exists()
    written = read(fewbits.convert(tmp_path / "shards", tmp_path / "out").path)
    expected = read(fewbits.convert(tiny, tmp_path / "whole").path)
    assert written.keys() == expected.keys()
    assert all(torch.equal(written[name], expected[name]) for name in expected)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_weight_with_nan_or_inf_is_refused_by_name(tiny: Path, tmp_path: Path, bad: float) -> None:
    model = shutil.copytree(tiny, tmp_path / "model")
    tensors = read(model)
    name = "model.layers.1.self_attn.k_proj.weight"
    tensors[name][7, 3] = bad
    save_file(tensors, model / WEIGHTS)
    with pytest.raises(fewbits.FewbitsError, match=f"{name}: .*NaN or Inf in output channel 7"):
        fewbits.convert(model, tmp_path / "out")
    assert fewbits.convert(model, tmp_path / "out", keep=["*.k_proj"], allow_nonfinite=True).path.is_dir()


def test_int8_is_not_converted_again(tiny_int8: Path, tmp_path: Path) -> None:
    with pytest.raises(fewbits.FewbitsError, match="is int8 already; convert the model that it was made from"):
        fewbits.convert(tiny_int8, tmp_path / "out", "int8")


def test_int8_is_dequantized_to_a_cast_and_the_second_rounding_is_told(tiny_int8: Path, tmp_path: Path) -> None:
    done = fewbits.convert(tiny_int8, tmp_path / "out", "bf16")
    assert done.rounding == "weights were rounded to int8 before and are rounded again, to bf16"
    name = "model.layers.0.mlp.up_proj.weight"
    codes, scales = read(tiny_int8)[name], read(tiny_int8)[f"{name}_scale"]
    assert torch.equal(read(tmp_path / "out")[name], (codes.float() * scales.float()).bfloat16())
    assert f"{name}_scale" not in read(tmp_path / "out")


def test_options_that_make_no_sense_are_refused(tiny: Path, tmp_path: Path) -> None:
    for options, message in {
        "to": ({"to": "int9"}, "precision 'int9' is unknown; did you mean int8"),
        "layout": ({"layout": "zip"}, "layout 'zip' is unknown; known: compressed-tensors"),
        "keep": ({"to": "bf16", "keep": ["*"]}, "quantizes nothing that could be kept"),
        "pattern": ({"keep": ["*.down_proj", "model.norm"]}, "'model.norm' matches no linear layer"),
        "all": ({"keep": ["*"]}, "no linear layer to quantize to int8 beside what is kept"),
    }.values():
        with pytest.raises(fewbits.FewbitsError, match=message):
            fewbits.convert(tiny, tmp_path / "out", **options)
    assert list(tmp_path.iterdir()) == []


# One conversion first, so that what is imported and built once is not counted.
MEASURE = """
import sys
from pathlib import Path
import fewbits
tiny, big, out = sys.argv[1:]
def kilobytes(key):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(key))
fewbits.convert(tiny, out + "/tiny")
Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
before = kilobytes("VmRSS")
fewbits.convert(big, out + "/big")
print(kilobytes("VmHWM") - before)
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's /proc to measure memory")
def test_a_conversion_holds_a_few_tensors_at_most(tiny: Path, tmp_path: Path) -> None:
    big = shutil.copytree(tiny, tmp_path / "big-source")
    config = tiny_config(hidden_size=512, intermediate_size=1408, num_hidden_layers=32, num_attention_heads=8,
                         num_key_value_heads=8, head_dim=64, dtype="bfloat16")  # fmt: skip
    config.save_pretrained(big)
    model = empty_model(config, torch.bfloat16)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    (big / WEIGHTS).unlink()
    with SafetensorsWriter(big / WEIGHTS, ((name, torch.bfloat16, shape) for name, shape in shapes.items())) as writer:
        for name, shape in shapes.items():
            writer.write(name, torch.linspace(-1, 1, torch.Size(shape).numel()).bfloat16().view(shape))
    size = (big / WEIGHTS).stat().st_size
    assert size > 200e6
    command = [sys.executable, "-c", MEASURE, tiny, big, tmp_path]
    grown = 1024 * int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert grown < 50e6, "a few tensors are 3 MB each in float32"
