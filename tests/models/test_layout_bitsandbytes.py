"""The bitsandbytes layout: bitsandbytes reads what we write, and we read what it writes, to the last bit."""

import json
import os
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import fewbits
from fewbits.errors import FewbitsError
from fewbits.models.layouts.bitsandbytes import entries, store
from fewbits.models.linear import QuantHead, QuantLinear
from fewbits.models.precision import PRECISIONS
from fewbits.models.quantized_source import DequantizedSource, QuantizedSource, as_weights
from fewbits.models.source import open_source
from fewbits.tensors.quantized import QuantizedTensor, quantize_weight

PEER = Path(__file__).with_name("peer_bitsandbytes.py")
PEERS = Path(__file__).parents[2] / "build" / "peers"
IDS = torch.arange(3, 67).view(2, 32)
load = partial(fewbits.AutoModelForCausalLM.from_pretrained, rotate=False)  # codes as they are stored

MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "qwen2, biases, tied, float32": ("qwen2", {"tie_word_embeddings": True, "dtype": torch.float32}),
    "qwen3, odd sizes, float16": ("qwen3", {"intermediate_size": 97, "dtype": torch.float16}),
    "gpt2, Conv1D": ("gpt2", {}),
}


def save(folder: Path, save_tiny: Callable, architecture: str, changes: dict[str, Any]) -> None:
    if architecture != "gpt2":
        save_tiny(folder, architecture, **changes)
        return
    save_tiny(folder)  # for its tokenizer
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=261, n_positions=64, n_embd=64, n_layer=2, n_head=4, bos_token_id=259)
    model = transformers.GPT2LMHeadModel(config)
    for parameter in model.parameters():
        if parameter.ndim == 2:
            torch.nn.init.normal_(parameter, 0, 0.2)
    model.to(torch.bfloat16).save_pretrained(folder)


@pytest.fixture(scope="module")
def all_folders(save_tiny: Callable, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Of each model the original, ours and theirs; skips without bitsandbytes in the environment or build/peers."""
    paths = os.pathsep.join([str(PEERS), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = os.environ | {"PYTHONPATH": paths, "HF_HUB_OFFLINE": "1"}
    if subprocess.run([sys.executable, "-c", "import bitsandbytes"], env=environment, capture_output=True).returncode:
        pytest.skip(f"bitsandbytes is not installed, neither in the environment nor in {PEERS}")
    folders = {kind: tmp_path_factory.mktemp("model") for kind in MODELS}
    for kind, folder in folders.items():
        save(folder / "original", save_tiny, *MODELS[kind])
        fewbits.convert(folder / "original", folder / "ours", layout="bitsandbytes")
    ran = subprocess.run([sys.executable, PEER, *folders.values()], env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr[-2000:]
    return folders


@pytest.fixture(params=MODELS)
def folder(request: pytest.FixtureRequest, all_folders: dict[str, Path]) -> Path:
    return all_folders[request.param]


def layers(model: torch.nn.Module) -> dict[str, QuantLinear]:
    """The layers that are quantized on disk too."""
    found = {name: module for name, module in model.named_modules() if isinstance(module, QuantLinear)}
    return {name: module for name, module in found.items() if not isinstance(module, QuantHead)}


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits


def check_against(theirs: dict[str, torch.Tensor], model: torch.nn.Module) -> None:
    """Check that both have the same layers, with the same codes, scales and values."""
    assert {name.removesuffix("/codes") for name in theirs if name.endswith("/codes")} == layers(model).keys()
    for name, layer in layers(model).items():
        weight = layer.quantized_weight()
        assert torch.equal(weight.codes, theirs[f"{name}/codes"]), name
        assert torch.allclose(weight.scales[:, 0].float() * 127, theirs[f"{name}/SCB"], rtol=2e-7, atol=0), name
        assert torch.allclose(weight.dequantize(), theirs[f"{name}/values"], rtol=4e-7, atol=0), name


def test_bitsandbytes_reads_what_we_write(folder: Path) -> None:
    model, theirs = load(folder / "ours"), load_file(folder / "ours.safetensors")
    check_against(theirs, model)
    exact = logits(load(folder / "original", precision="fp32"))
    for found in (logits(model), theirs["logits"]):
        assert (found - exact).abs().mean() < 0.1 * exact.std()


def test_we_read_what_bitsandbytes_writes(folder: Path, tmp_path: Path) -> None:
    source = as_weights(open_source(folder / "theirs"))
    assert isinstance(source, QuantizedSource)
    assert (source.layout, source.precision.name, source.scale_dtype) == ("bitsandbytes", "int8", torch.float32)
    stored = load_file(folder / "theirs" / "model.safetensors")
    for name in source.weights:
        weight = source.read_quantized(name)
        assert torch.equal(weight.codes, stored[name])
        assert torch.equal(weight.scales[:, 0], stored[f"{name.removesuffix('weight')}SCB"] / 127)
    model = load(folder / "theirs")
    check_against(load_file(folder / "theirs.safetensors"), model)
    exact = logits(load(folder / "original", precision="fp32"))
    assert (logits(model) - exact).abs().mean() < 0.1 * exact.std()
    model.save_pretrained(tmp_path / "again")  # in the default layout, with the same scales
    again = as_weights(open_source(tmp_path / "again"))
    for name in source.weights:
        assert torch.equal(again.read_quantized(name).codes, source.read_quantized(name).codes)
        assert torch.equal(again.read_quantized(name).scales, source.read_quantized(name).scales)


@pytest.mark.parametrize("kind", ["nf4", "nested", "fp4"])
def test_we_read_4_bits(folder: Path, kind: str) -> None:
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        source = as_weights(open_source(folder / kind))
    theirs = load_file(folder / f"{kind}.safetensors")
    for name, values in theirs.items():
        assert torch.equal(source.read(f"{name}.weight").to(values.dtype), values), name
    other = [str(warning.message) for warning in warned if "another scheme" in str(warning.message)]
    if kind == "fp4":
        assert type(source) is DequantizedSource
        assert len(other) == 1
        return
    assert isinstance(source, QuantizedSource)
    assert (source.precision.name, source.precision.group_size) == ("nf4", 64)
    assert len(source.weights) == len(theirs) - 2 * len(other)  # where blocks go across rows
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        model = load(folder / kind)
    for name in source.weights:
        layer = model.get_submodule(name.removesuffix(".weight"))
        assert isinstance(layer, QuantLinear)
        values = theirs[name.removesuffix(".weight")]
        assert torch.equal(layer.quantized_weight().dequantize().to(values.dtype), values), name


# --- as specified -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ours(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fewbits.convert(tiny, tmp_path_factory.mktemp("ours") / "ours", layout="bitsandbytes").path


def test_the_configuration_is_as_specified(ours: Path) -> None:
    assert json.loads((ours / "config.json").read_text())["quantization_config"] == {
        "quant_method": "bitsandbytes",
        "load_in_8bit": True,
        "load_in_4bit": False,
        "llm_int8_threshold": 6.0,
        "llm_int8_skip_modules": ["lm_head"],
        "llm_int8_enable_fp32_cpu_offload": False,
        "llm_int8_has_fp16_weight": False,
        "bnb_4bit_compute_dtype": "float32",
        "bnb_4bit_quant_type": "fp4",
        "bnb_4bit_use_double_quant": False,
        "bnb_4bit_quant_storage": "uint8",
    }


def test_tensors_are_as_specified(tiny: Path, ours: Path) -> None:
    original, converted = (load_file(folder / "model.safetensors") for folder in (tiny, ours))
    linear = [name for name in original if name.endswith("_proj.weight")]
    beside = {f"{name.removesuffix('weight')}{part}" for name in linear for part in ("SCB", "weight_format")}
    assert converted.keys() == original.keys() | beside
    for name in linear:
        codes, N = converted[name], original[name].shape[0]
        SCB, layout = (converted[f"{name.removesuffix('weight')}{part}"] for part in ("SCB", "weight_format"))
        assert (codes.dtype, codes.shape) == (torch.int8, original[name].shape)
        assert (SCB.dtype, SCB.shape) == (torch.float32, (N,))
        assert (layout.dtype, layout.shape, layout.item()) == (torch.uint8, (), 0)
        step = SCB[:, None] / 127
        assert ((codes * step - original[name].float()).abs() <= step * 0.5001).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_scales_come_back(dtype: torch.dtype, tmp_path: Path) -> None:
    weight = quantize_weight(
        torch.randn(4096, 8, generator=torch.Generator().manual_seed(0)), "int8", scale_dtype=dtype
    )
    stored = store("a.weight", weight, PRECISIONS["int8"])
    declared = entries("a.weight", (4096, 8), PRECISIONS["int8"], dtype)
    assert {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in stored.items()} == declared
    again, scales = stored["a.SCB"] / 127, weight.scales.float()[:, 0]
    if dtype == torch.float32:
        assert ((again - scales).abs() <= torch.finfo(dtype).eps * scales).all()
    else:
        assert torch.equal(again, scales)


def test_a_stack_is_stored_as_declared() -> None:
    weight = QuantizedTensor(torch.ones(3, 5, 8, dtype=torch.int8), torch.ones(3, 5, 1))
    stored = store("experts.up_proj", weight, PRECISIONS["int8"])
    declared = entries("experts.up_proj", (3, 5, 8), PRECISIONS["int8"], torch.float32)
    assert {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in stored.items()} == declared
    assert declared.keys() == {"experts.up_proj", "experts.up_proj_SCB", "experts.up_proj_weight_format"}


# --- what is wrong with a checkpoint is said by name ----------------------------------------------------------------

UP = "model.layers.0.mlp.up_proj"
BAD: list[tuple[str, torch.Tensor | None, str]] = [
    ("SCB", None, f"{UP}.weight is int8, but {UP}.SCB is missing; download it again"),
    ("SCB", torch.ones(95), rf"{UP}.SCB has shape \[95\], the codes want \[96\]; download it again"),
    ("SCB", torch.ones(96, 1), rf"{UP}.SCB has shape \[96, 1\], the codes want \[96\]"),
    ("SCB", torch.ones(96).half(), f"{UP}.SCB is stored as F16, the layout wants F32; download it again"),
    ("weight", torch.ones(96, 64), f"{UP}.weight is stored as F32, the layout wants I8; download it again"),
    (
        "weight_format",
        torch.tensor(2, dtype=torch.uint8),
        f"{UP}.weight_format is 2, an order of codes for one kind of",
    ),
    ("weight_format", torch.tensor([0, 0]), rf"{UP}.weight_format is \[0, 0\], an order .* only 0, row after row, is"),
]


@pytest.mark.parametrize(("part", "tensor", "message"), BAD)
def test_a_bad_checkpoint_is_refused(
    ours: Path, tmp_path: Path, part: str, tensor: torch.Tensor | None, message: str
) -> None:
    folder = shutil.copytree(ours, tmp_path / "bad")
    stored = load_file(folder / "model.safetensors") | {f"{UP}.{part}": tensor}
    save_file({name: each for name, each in stored.items() if each is not None}, folder / "model.safetensors")
    with pytest.raises(FewbitsError, match=message):
        load(folder)


def test_a_missing_format_means_row_after_row(ours: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(ours, tmp_path / "old")
    stored = load_file(folder / "model.safetensors")
    save_file({name: each for name, each in stored.items() if "format" not in name}, folder / "model.safetensors")
    assert torch.equal(logits(load(folder)), logits(load(ours)))


STATE = {"shape": [96, 64], "blocksize": 64, "dtype": "bfloat16", "quant_type": "nf4"}
BAD_4BIT: list[tuple[str, torch.Tensor | None, str]] = [
    ("weight", None, f"{UP}.weight.quant_state.bitsandbytes__nf4 is there, but {UP}.weight is missing; download it"),
    (
        "weight",
        torch.zeros(96, 32, dtype=torch.uint8),
        rf"{UP}.weight has shape \[96, 32\], the codes want \[3072, 1\]",
    ),
    ("weight", torch.zeros(3072, 1), f"{UP}.weight is stored as F32, the layout wants U8; download it again"),
    ("weight.absmax", None, f"{UP}.weight is U8, but {UP}.weight.absmax is missing; download it again"),
    ("weight.absmax", torch.zeros(95), rf"{UP}.weight.absmax has shape \[95\], the codes want \[96\]; download"),
    (
        "weight.absmax",
        torch.zeros(96, dtype=torch.uint8),
        f"{UP}.weight is U8, but {UP}.weight.nested_absmax is missing",
    ),
    ("weight.quant_map", torch.zeros(15), rf"{UP}.weight.quant_map has shape \[15\], the codes want \[16\]"),
    ("weight.quant_map", torch.zeros(16).half(), f"{UP}.weight.quant_map is stored as F16, the layout wants F32"),
]


def save_4bit(ours: Path, folder: Path, state: bytes, **changes: torch.Tensor | None) -> Path:
    """A folder with one weight in 4 bits."""
    shutil.copytree(ours, folder)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] |= {"load_in_8bit": False, "load_in_4bit": True}
    (folder / "config.json").write_text(json.dumps(config))
    codebook = torch.tensor(PRECISIONS["nf4"].weights.codebook)
    stored: dict[str, torch.Tensor | None] = {
        "weight": torch.zeros(3072, 1, dtype=torch.uint8),
        "weight.absmax": torch.ones(96),
        "weight.quant_map": codebook,
        "weight.quant_state.bitsandbytes__nf4": torch.tensor(list(state), dtype=torch.uint8),
    } | changes
    tensors = {f"{UP}.{part}": tensor for part, tensor in stored.items() if tensor is not None}
    save_file(tensors | {"other": torch.ones(1)}, folder / "model.safetensors")
    return folder


@pytest.mark.parametrize(("part", "tensor", "message"), BAD_4BIT)
def test_a_bad_4_bit_checkpoint_is_refused(
    ours: Path, tmp_path: Path, part: str, tensor: torch.Tensor | None, message: str
) -> None:
    folder = save_4bit(ours, tmp_path / "bad", json.dumps(STATE).encode(), **{part: tensor})
    with pytest.raises(FewbitsError, match=message):
        as_weights(open_source(folder))


BAD_STATES = [{"shape": [96]}, {"shape": None}, {"blocksize": 0}, {"blocksize": "64"}, {"dtype": "int8"}]


@pytest.mark.parametrize("state", [b"{", b"[]", b"\xff", *(json.dumps(STATE | bad).encode() for bad in BAD_STATES)])
def test_a_bad_description_is_refused(ours: Path, tmp_path: Path, state: bytes) -> None:
    folder = save_4bit(ours, tmp_path / "bad", state)
    with pytest.raises(FewbitsError, match=rf"{UP}.weight.quant_state.bitsandbytes__nf4 is no JSON with a shape"):
        as_weights(open_source(folder))


def test_the_first_code_is_in_the_high_half(ours: Path, tmp_path: Path) -> None:
    codes = torch.full((3072, 1), 0xF0, dtype=torch.uint8)  # 15 is 1, 0 is -1
    folder = save_4bit(ours, tmp_path / "good", json.dumps(STATE).encode(), weight=codes)
    expected = torch.tensor([1.0, -1.0]).repeat(96, 32)
    assert torch.equal(as_weights(open_source(folder)).read(f"{UP}.weight"), expected)


def test_neither_8_nor_4_bits_is_refused(ours: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(ours, tmp_path / "none")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] |= {"load_in_8bit": False}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(
        FewbitsError, match=r"have load_in_8bit or load_in_4bit .* and this one has neither; load it with"
    ):
        load(folder)
