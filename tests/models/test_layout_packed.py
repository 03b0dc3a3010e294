"""int4, int8 and fp8 weights in the compressed-tensors layout: as specified, and as transformers reads them."""

import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import transformers
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32
from safetensors.torch import load_file, save_file
from transformers import CompressedTensorsConfig

import fewbits
from fewbits.errors import FewbitsError
from fewbits.models.layouts.compressed_tensors import entries, store
from fewbits.models.layouts.packed_words import pack_words, unpack_words
from fewbits.models.linear import QuantHead, QuantLinear
from fewbits.models.precision import PRECISIONS, fit_groups
from fewbits.models.quantized_source import as_weights
from fewbits.models.source import open_source
from fewbits.tensors.packing import pack_codes, unpack_codes
from fewbits.tensors.quantized import quantize_weight

IDS = torch.arange(3, 67).view(2, 32)
PACKED = ["int4", "int8-weight"]
MODELS: dict[str, tuple[str, dict[str, Any], int]] = {  # the last is the group size that their widths allow
    "llama": ("llama", {}, 32),
    "qwen2, biases, tied, float32": ("qwen2", {"tie_word_embeddings": True, "dtype": torch.float32}, 32),
    "qwen3, odd sizes": ("qwen3", {"intermediate_size": 97, "dtype": torch.float16}, 64),
}
load = partial(fewbits.AutoModelForCausalLM.from_pretrained, rotate=False)  # codes as they are stored


class Saved(NamedTuple):
    """A model, and the same in few bits."""

    original: Path
    folder: Path
    precision: str
    dtype: torch.dtype
    group_size: int | None
    model: transformers.PreTrainedModel


@pytest.fixture(scope="module", params=[f"{precision}: {model}" for precision in (*PACKED, "fp8") for model in MODELS])
def saved(request: pytest.FixtureRequest, save_tiny: Callable, tmp_path_factory: pytest.TempPathFactory) -> Saved:
    precision, kind = request.param.split(": ")
    folder = tmp_path_factory.mktemp("layout")
    architecture, changes, group_size = MODELS[kind]
    save_tiny(folder / "original", architecture, **changes)
    model = load(folder / "original", precision=precision)
    model.save_pretrained(folder / precision)
    dtype = changes.get("dtype", torch.bfloat16)
    group_size = group_size if precision in PACKED else None
    return Saved(folder / "original", folder / precision, precision, dtype, group_size, model)


def layers(model: torch.nn.Module) -> dict[str, QuantLinear]:
    """The layers that are quantized on disk too."""
    found = {name: module for name, module in model.named_modules() if isinstance(module, QuantLinear)}
    return {name: module for name, module in found.items() if not isinstance(module, QuantHead)}


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits


def same(found: torch.Tensor, expected: torch.Tensor) -> bool:
    """Whether two tensors are equal in every bit."""
    return found.dtype == expected.dtype and torch.equal(found.view(torch.uint8), expected.view(torch.uint8))


def test_tensors_are_as_specified(saved: Saved) -> None:
    stored = load_file(saved.folder / "model.safetensors")
    assert len(layers(saved.model)) in (12, 14)  # of 97 input features none are whole groups
    for name, layer in layers(saved.model).items():
        weight, (N, K) = layer.quantized_weight(), (layer.out_features, layer.in_features)
        scales = stored.pop(f"{name}.weight_scale")
        assert (scales.dtype, scales.shape) == (saved.dtype, (N, K // (saved.group_size or K)))
        assert torch.equal(scales, weight.scales)
        if saved.precision == "fp8":
            assert same(stored.pop(f"{name}.weight"), weight.codes)
            continue
        shape = stored.pop(f"{name}.weight_shape")
        assert (shape.dtype, shape.tolist()) == (torch.int64, [N, K])
        bits = 4 if saved.precision == "int4" else 8
        codes = ((unpack_codes(weight.codes) ^ 8).view(torch.int8) - 8) if bits == 4 else weight.codes
        assert same(stored.pop(f"{name}.weight_packed"), pack_to_int32(codes, bits))
        assert f"{name}.weight" not in stored
    original = load_file(saved.original / "model.safetensors")
    for name, tensor in stored.items():
        assert tensor.dtype == saved.dtype
        assert name == "lm_head.weight" or same(tensor, original[name])


@pytest.mark.filterwarnings("ignore:You passed `quantization_config`:UserWarning:transformers")  # as documented
def test_transformers_dequantizes_to_our_weights(saved: Saved) -> None:
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        saved.folder, quantization_config=CompressedTensorsConfig(dequantize=True), dtype=torch.float32
    )
    for name, layer in layers(saved.model).items():
        dense = theirs.get_submodule(name)
        product = layer.quantized_weight().dequantize().to(saved.dtype).float()  # theirs has the scales' dtype
        assert torch.equal(product, dense.weight.data), name
        assert layer.bias is None or torch.equal(layer.bias, dense.bias.data), name


def test_transformers_predicts_what_we_predict(saved: Saved) -> None:
    theirs = transformers.AutoModelForCausalLM.from_pretrained(saved.folder, dtype=torch.float32).eval()
    found, expected = logits(saved.model), logits(theirs)
    exact = logits(load(saved.original, precision="fp32"))
    # int4: they compute with activations as they are, we with 8 bits; fp8: their scale of a token is rounded
    few = {"int8-weight": 0.02, "int4": 0.05, "fp8": 0.15}[saved.precision]
    assert (found - expected).abs().mean() < few * exact.std()
    assert 1e-3 * exact.std() < (expected - exact).abs().mean() < 0.5 * exact.std()


def test_saved_and_loaded_it_is_the_same_model(saved: Saved, tmp_path: Path) -> None:
    again = load(saved.folder)
    ours, theirs = saved.model.state_dict(), again.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(same(theirs[name], tensor) for name, tensor in ours.items())
    assert torch.equal(logits(again), logits(saved.model))
    again.save_pretrained(tmp_path / "again")
    first, second = (load_file(folder / "model.safetensors") for folder in (saved.folder, tmp_path / "again"))
    assert first.keys() == second.keys()
    assert all(same(second[name], tensor) for name, tensor in first.items())


def test_nf4_has_no_layout(tiny: Path, tmp_path: Path) -> None:
    model = load(tiny, precision="nf4")
    message = (
        "nf4 has no layout that it could be saved in; load the original, .* in one of "
        "int8, int8-weight, int4, mxfp4, fp8"
    )
    with pytest.warns(UserWarning, match=message):
        assert not model.hf_quantizer.is_serializable()
    with pytest.warns(UserWarning, match=message), pytest.raises(ValueError, match="is not serializable"):
        model.save_pretrained(tmp_path / "nf4")
    assert not (tmp_path / "nf4" / "model.safetensors").exists()


# --- stacks of experts ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", [*PACKED, "fp8", "int8"])
def test_a_stack_is_stored_as_declared(precision: str) -> None:
    wanted = fit_groups(PRECISIONS[precision], [64])
    weight = quantize_weight(torch.randn(3 * 5, 64), wanted.weights.name, group_size=wanted.group_size).view(3, 5)
    declared = entries("mlp.experts.up_proj", (3, 5, 64), wanted, torch.float32)
    stored = store("mlp.experts.up_proj", weight, wanted)
    assert {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in stored.items()} == declared
    if precision in PACKED:
        assert stored["mlp.experts.up_proj_shape"].tolist() == [3, 5, 64]


@pytest.mark.parametrize("precision", [*PACKED, "fp8", "int8"])
def test_experts_are_saved_and_loaded(tmp_path: Path, precision: str) -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = transformers.MixtralConfig(vocab_size=260, num_hidden_layers=1, num_local_experts=4, **sizes)
    transformers.MixtralForCausalLM(config).to(torch.bfloat16).save_pretrained(tmp_path / "original")
    model = load(tmp_path / "original", precision=precision)
    model.save_pretrained(tmp_path / "saved")
    weights = as_weights(open_source(tmp_path / "saved")).weights
    assert [shape for name, shape in weights.items() if "experts" in name] == [(4, 64, 96), (4, 192, 64)]
    again = load(tmp_path / "saved")
    assert all(same(again.state_dict()[name], tensor) for name, tensor in model.state_dict().items())
    assert torch.equal(logits(again), logits(model))


# --- words ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("K", [2, 6, 8, 32, 34, 96])
@pytest.mark.parametrize("bits", [4, 8])
def test_words_are_those_of_the_package(K: int, bits: int) -> None:
    codes = torch.randint(-(2 ** (bits - 1)), 2 ** (bits - 1), (5, K), dtype=torch.int8)
    ours = pack_codes(codes.view(torch.uint8) & 15) if bits == 4 else codes
    words = pack_words(ours, bits)
    assert same(words, pack_to_int32(codes, bits))
    assert same(unpack_words(words, bits, K), ours)


# --- what is wrong with a checkpoint is said by name ----------------------------------------------------------------

UP = "model.layers.0.mlp.up_proj.weight"
INT4: list[tuple[str, torch.Tensor | None, str]] = [
    ("_scale", None, f"{UP}_packed is codes in 32-bit words, but {UP}_scale is missing; download it again"),
    ("_shape", None, f"{UP}_packed is codes in 32-bit words, but {UP}_shape is missing; download it again"),
    ("_packed", None, "1 tensors of the model are not in the checkpoint, such as model.*up_proj.weight; download it"),
    ("_scale", torch.ones(96, 3), rf"{UP}_scale has shape \[96, 3\], the codes want \[96, 2\]; download it again"),
    ("_scale", torch.ones(96, 2, dtype=torch.int8), f"{UP}_scale is stored as I8, the layout wants F32 or BF16 or F16"),
    (
        "_shape",
        torch.tensor([96, 65]),
        rf"{UP}_shape says \[96, 65\], but {UP}_packed has shape \[96, 8\], 8 codes in a",
    ),
    ("_shape", torch.tensor([95, 64]), rf"{UP}_shape says \[95, 64\], but {UP}_packed has shape \[96, 8\]"),
    ("_shape", torch.tensor([-96, -64]), rf"{UP}_shape says \[-96, -64\], but"),
    ("_shape", torch.tensor([96]), rf"{UP}_shape has shape \[1\], the codes want \[2\]; download it again"),
    ("_shape", torch.tensor([96.0, 64.0]), f"{UP}_shape is stored as F32, the layout wants I64 or I32; download it"),
    ("_packed", torch.ones(96, 8), f"{UP}_packed is stored as F32, the layout wants I32; download it again"),
    (
        "_g_idx",
        torch.zeros(64, dtype=torch.int32),
        f"{UP}_g_idx: weights that have it cannot be read; load it with tran",
    ),
    ("_shape", torch.tensor([96, 60]), rf"{UP} has 60 input features, no multiple of the group size 32 in config.json"),
]
FP8: list[tuple[str, torch.Tensor | None, str]] = [
    ("_scale", None, f"{UP} is float8_e4m3fn, but {UP}_scale is missing; download it again"),
    ("_scale", torch.ones(96), rf"{UP}_scale has shape \[96\], the codes want \[96, 1\]; download it again"),
    ("", torch.ones(96, 64, dtype=torch.int8), f"{UP} is stored as I8, the layout wants F8_E4M3; download it again"),
    ("", torch.ones(96).to(torch.float8_e4m3fn), rf"{UP} has shape \[96\], no matrix of codes; download it again"),
    ("", torch.ones(96, 64), f"{UP} is stored as F32, the layout wants F8_E4M3; download it again"),
    ("_packed", torch.ones(96, 8, dtype=torch.int32), f"{UP}_packed holds words, but its scheme is of floats"),
]


@pytest.fixture(scope="module")
def folders(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bad")
    for precision in ("int4", "fp8"):
        load(tiny, precision=precision).save_pretrained(folder / precision)
    return folder


@pytest.mark.parametrize(
    ("precision", "suffix", "tensor", "message"),
    [("int4", *case) for case in INT4] + [("fp8", *case) for case in FP8],
)
def test_a_bad_checkpoint_is_refused(
    folders: Path, tmp_path: Path, precision: str, suffix: str, tensor: torch.Tensor | None, message: str
) -> None:
    folder = shutil.copytree(folders / precision, tmp_path / "bad")
    stored = load_file(folder / "model.safetensors")
    stored[f"{UP}{suffix}"] = tensor
    save_file({name: each for name, each in stored.items() if each is not None}, folder / "model.safetensors")
    with pytest.raises(FewbitsError, match=message):
        load(folder)


ZERO_POINTS: list[tuple[torch.Tensor | None, str]] = [
    (None, f"{UP}_packed is codes in 32-bit words, but {UP}_zero_point is missing; download it again"),
    (torch.zeros(96, 2, dtype=torch.int8), f"{UP}_zero_point is stored as I8, the layout wants I32; download it again"),
    (
        torch.zeros(96, 2, dtype=torch.int32),
        rf"{UP}_zero_point has shape \[96, 2\], the codes want \[12, 2\]; download",
    ),
]


@pytest.mark.parametrize(("tensor", "message"), ZERO_POINTS)
def test_bad_zero_points_are_refused(folders: Path, tmp_path: Path, tensor: torch.Tensor | None, message: str) -> None:
    folder = shutil.copytree(folders / "int4", tmp_path / "bad")
    stored = load_file(folder / "model.safetensors")
    for name in [name for name in stored if name.endswith("_scale")]:
        N, G = stored[name].shape
        stored[name.replace("_scale", "_zero_point")] = torch.zeros(N // 8, G, dtype=torch.int32)
    stored[f"{UP}_zero_point"] = tensor
    save_file({name: each for name, each in stored.items() if each is not None}, folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["config_groups"]["group_0"]["weights"]["symmetric"] = False
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(FewbitsError, match=message):
        load(folder)


def test_a_folder_without_any_codes_is_refused(tiny: Path, folders: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(folders / "int4", tmp_path / "plain")
    shutil.copy(tiny / "model.safetensors", folder)
    message = "config.json says compressed-tensors, but no tensor is quantized; take quantization_config out of it"
    with pytest.raises(FewbitsError, match=message):
        load(folder)


def test_a_layer_of_another_precision_stays_in_it(folders: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(folders / "int4", tmp_path / "mixed")
    stored = load_file(folder / "model.safetensors")
    values = as_weights(open_source(folder)).read(UP)
    int8 = quantize_weight(values, "int8", scale_dtype=torch.bfloat16)
    for suffix in ("_packed", "_shape", "_scale"):
        del stored[f"{UP}{suffix}"]
    save_file(stored | {UP: int8.codes, f"{UP}_scale": int8.scales}, folder / "model.safetensors")
    config = transformers.AutoConfig.from_pretrained(folder)
    quantization = config.quantization_config
    quantization = quantization if isinstance(quantization, dict) else quantization.to_dict()
    weights = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel", "dynamic": False}
    quantization["config_groups"]["group_1"] = {"targets": [UP.removesuffix(".weight")], "weights": weights}
    config.quantization_config = quantization | {"format": "mixed-precision"}
    config.save_pretrained(folder)
    model = load(folder)
    up, gate = model.model.layers[0].mlp.up_proj, model.model.layers[0].mlp.gate_proj
    assert isinstance(up, QuantLinear)
    assert isinstance(gate, QuantLinear)
    assert (up.format, up.activations, gate.format) == ("int8", None, "int4")
    assert torch.equal(up.quantized_weight().dequantize(), int8.dequantize())


def test_a_layer_of_a_scheme_without_precision_is_read_as_its_values(folders: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(folders / "int4", tmp_path / "mixed")
    stored = load_file(folder / "model.safetensors")
    values = as_weights(open_source(folder)).read(UP)
    fp8 = quantize_weight(values, "e4m3fn", scale_dtype=torch.bfloat16)
    for suffix in ("_packed", "_shape", "_scale"):
        del stored[f"{UP}{suffix}"]
    save_file(stored | {UP: fp8.codes, f"{UP}_scale": fp8.scales}, folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    weights = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "channel", "dynamic": False}
    group = {"targets": [UP.removesuffix(".weight")], "weights": weights}
    config["quantization_config"]["config_groups"]["group_1"] = group
    config["quantization_config"]["format"] = "mixed-precision"
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.warns(UserWarning, match=f"mixed: 1 weights, such as {UP}, are of another scheme"):
        model = load(folder)
    assert type(model.model.layers[0].mlp.up_proj) is torch.nn.Linear
    assert isinstance(model.model.layers[0].mlp.gate_proj, QuantLinear)
    assert torch.equal(model.get_parameter(UP).data, fp8.dequantize().bfloat16().float())
