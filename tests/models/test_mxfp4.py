"""mxfp4: the codes and scales of the format, in memory, in a checkpoint, and as transformers reads them."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from compressed_tensors.compressors.mxfp4.base import MXFP4PackedCompressor
from compressed_tensors.quantization.quant_scheme import MXFP4A16, QuantizationScheme
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import CompressedTensorsConfig

import fewbits
from fewbits.errors import FewbitsError
from fewbits.models.layouts.exponents import exponents_of, powers_of_two
from fewbits.models.linear import QuantHead, QuantLinear
from fewbits.quantize.least_error import least_error
from fewbits.tensors.packing import unpack_codes
from fewbits.tensors.quantized import quantize_weight

IDS = torch.arange(3, 67).view(2, 32)
UP = "model.layers.0.mlp.up_proj.weight"
load = fewbits.AutoModelForCausalLM.from_pretrained


@pytest.fixture(scope="module")
def saved(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mxfp4") / "model"
    fewbits.convert(tiny, folder, to="mxfp4")
    return folder


def layers(model: torch.nn.Module) -> dict[str, QuantLinear]:
    found = {name: module for name, module in model.named_modules() if isinstance(module, QuantLinear)}
    return {name: module for name, module in found.items() if not isinstance(module, QuantHead)}


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits


# --- numbers --------------------------------------------------------------------------------------------------------


@given(st.integers(0, 2**31), st.sampled_from([torch.float32, torch.bfloat16, torch.float16]), st.floats(-8, 8))
def test_codes_and_scales_are_those_of_the_format(seed: int, dtype: torch.dtype, spread: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    w = torch.randn(5, 96, generator=generator) * torch.exp2(spread * torch.rand(5, 1, generator=generator))
    w[0, :9] = torch.tensor([0.25, -0.25, 0.75, 1.25, -1.75, 2.5, 3.5, 5.0, 7.9])  # ties, and one that saturates
    weight = quantize_weight(w.to(dtype), "e2m1fn", group_size=32, scale_dtype=torch.float16)
    expected = fewbits.encode(w.to(dtype), "mxfp4")
    assert torch.equal(unpack_codes(weight.codes), expected.codes)
    assert torch.equal(exponents_of(weight.scales), expected.scales)
    assert torch.equal(weight.dequantize(), fewbits.round_to(w.to(dtype).float(), "mxfp4"))


def test_zeros_and_tiny_weights_stay_numbers() -> None:
    w = torch.zeros(2, 64)
    w[1, 40] = 2.0**-140
    weight = quantize_weight(w, "e2m1fn", group_size=32)
    assert (weight.scales[:, 0] == 2.0**-126).all()
    assert torch.equal(weight.dequantize(), torch.zeros(2, 64))


def test_exponents_are_e8m0() -> None:
    stored = torch.arange(256, dtype=torch.uint8)
    powers = powers_of_two(stored)
    assert torch.equal(powers[:255].double(), torch.exp2(torch.arange(255).double() - 127))
    assert powers[255].isnan()
    assert torch.equal(exponents_of(powers), stored)


def test_least_error_chooses_among_powers_of_two() -> None:
    w = torch.randn(64, 128, generator=torch.Generator().manual_seed(0))
    usual, least = (make(w, "e2m1fn", group_size=32) for make in (quantize_weight, least_error))
    assert (torch.frexp(least.scales.float())[0] == 0.5).all()
    before, after = ((weight.dequantize() - w).square().sum() for weight in (usual, least))
    assert after < before


# --- checkpoints ----------------------------------------------------------------------------------------------------


def test_a_checkpoint_is_as_the_package_writes_it(tiny: Path, saved: Path) -> None:
    original, stored = (load_file(folder / "model.safetensors") for folder in (tiny, saved))
    scheme = QuantizationScheme(targets=["Linear"], **MXFP4A16)
    assert f"{UP}_shape" not in stored
    for name in [name.removesuffix("_packed") for name in stored if name.endswith("_packed")]:
        scales = powers_of_two(stored[f"{name}_scale"]).float()
        theirs = MXFP4PackedCompressor.compress({"weight": original[name].float(), "weight_scale": scales}, scheme)
        assert torch.equal(theirs["weight_scale"], stored[f"{name}_scale"])
        assert torch.equal(theirs["weight_packed"] & 0x77, stored[f"{name}_packed"] & 0x77)  # but for the sign of 0
        assert torch.equal(MXFP4PackedCompressor.decompress({
            "weight_packed": stored[f"{name}_packed"], "weight_scale": stored[f"{name}_scale"],
        }, scheme)["weight"].float(), fewbits.round_to(original[name].float(), "mxfp4"))  # fmt: skip


@pytest.mark.filterwarnings("ignore:You passed `quantization_config`:UserWarning:transformers")  # as documented
def test_transformers_reads_our_weights(saved: Path) -> None:
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        saved, quantization_config=CompressedTensorsConfig(dequantize=True), dtype=torch.float32
    )
    ours = load(saved)
    assert len(layers(ours)) == 14
    for name, layer in layers(ours).items():
        assert torch.equal(layer.quantized_weight().dequantize(), theirs.get_submodule(name).weight.data), name
    expected = logits(theirs.eval())
    assert (logits(ours) - expected).abs().mean() < 0.02 * expected.std()  # our head has 8 bits


def test_transformers_runs_it(saved: Path) -> None:
    theirs = transformers.AutoModelForCausalLM.from_pretrained(saved, dtype=torch.bfloat16).eval()
    expected = logits(theirs).float()  # it gives weights in bfloat16 whatever dtype is asked for
    assert (logits(load(saved)) - expected).abs().mean() < 0.03 * expected.std()


def test_converted_saved_and_loaded_it_is_the_same(tiny: Path, saved: Path, tmp_path: Path) -> None:
    expected = logits(load(tiny, precision="mxfp4"))
    model = load(saved)
    assert torch.equal(logits(model), expected)
    model.save_pretrained(tmp_path)
    first, second = (load_file(folder / "model.safetensors") for folder in (saved, tmp_path))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first if name != "lm_head.weight")


@pytest.mark.parametrize(
    ("suffix", "tensor", "message"),
    [
        ("_scale", torch.ones(96, 2), f"{UP}_scale is stored as F32, the layout wants U8; download it again"),
        ("_scale", torch.ones(96, 3, dtype=torch.uint8), rf"{UP}_scale has shape \[96, 3\], the codes want \[96, 2\]"),
        ("_packed", torch.ones(96, 8, dtype=torch.int32), f"{UP}_packed is stored as I32, the layout wants U8"),
        ("_scale", None, f"{UP}_packed is U8, but {UP}_scale is missing; download it again"),
        ("_packed", torch.ones(96, 24, dtype=torch.uint8), f"{UP} has 48 input features, no multiple of the group"),
    ],
)
def test_a_bad_checkpoint_is_refused(
    saved: Path, tmp_path: Path, suffix: str, tensor: torch.Tensor | None, message: str
) -> None:
    folder = shutil.copytree(saved, tmp_path / "bad")
    stored = load_file(folder / "model.safetensors") | {f"{UP}{suffix}": tensor}
    save_file({name: each for name, each in stored.items() if each is not None}, folder / "model.safetensors")
    with pytest.raises(FewbitsError, match=message):
        load(folder)


@pytest.mark.parametrize("change", [{"group_size": 16}, {"strategy": "channel"}, {"symmetric": False}])
def test_other_4_bit_floats_are_refused(saved: Path, tmp_path: Path, change: dict[str, object]) -> None:
    folder = shutil.copytree(saved, tmp_path / "other")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["config_groups"]["group_0"]["weights"] |= change
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(FewbitsError, match=r"4-bit floats are read in symmetric groups of 32 \(MXFP4\)"):
        load(folder)
