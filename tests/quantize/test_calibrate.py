"""Conversion by GPTQ: calibrated block by block, on text that quality is not measured on."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

import fewbits
from fewbits.errors import FewbitsError
from fewbits.measure.text import token_windows
from fewbits.models.linear import QuantLinear
from fewbits.quantize.calibrate import WINDOW_TOKENS, WINDOWS, calibration_windows

load = fewbits.AutoModelForCausalLM.from_pretrained
TEXT = "\n".join(f"hello {n} hell {n * n} 漢 don't he'll {n % 7}" for n in range(2000))


@pytest.fixture
def text(tmp_path: Path) -> Path:
    (tmp_path / "text.txt").write_text(TEXT)
    return tmp_path / "text.txt"


def logits(model: torch.nn.Module) -> Tensor:
    ids = fewbits.AutoTokenizer.from_pretrained(model.name_or_path)(TEXT[-3000:], return_tensors="pt")["input_ids"]
    with torch.no_grad():
        return model(ids[:, :100]).logits


def error(folder: Path, tiny: Path, **options: bool) -> float:
    expected = logits(load(tiny, precision="fp32"))
    return ((logits(load(folder, **options)) - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize(
    ("precision", "rotate"), [("int4", False), ("int4", True), ("int8-weight", False), ("fp8", False)]
)
def test_it_loses_less_than_rounding_to_nearest(
    tiny: Path, tmp_path: Path, text: Path, precision: str, rotate: bool
) -> None:
    blocks: list[tuple[int, int]] = []
    plain = fewbits.convert(tiny, tmp_path / "plain", precision, rotate=rotate)
    found = fewbits.convert(
        tiny, tmp_path / "gptq", precision, rotate=rotate, calibrate=text, on_block=lambda *at: blocks.append(at)
    )
    assert blocks == [(1, 2), (2, 2)]
    assert found.nbytes == plain.nbytes
    assert error(found.path, tiny) < error(plain.path, tiny)


def test_codes_are_in_the_layout_as_usual(tiny: Path, tmp_path: Path, text: Path) -> None:
    folder = fewbits.convert(tiny, tmp_path / "gptq", "int4", calibrate=text, keep=["*.k_proj"]).path
    model = load(folder)
    quantized = {name for name, module in model.named_modules() if type(module) is QuantLinear}
    assert len(quantized) == 2 * 6
    assert not any("k_proj" in name for name in quantized)
    again = fewbits.convert(tiny, tmp_path / "again", "int4", calibrate=text, keep=["*.k_proj"]).path
    assert (again / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()


def test_least_error_scales(tiny: Path, tmp_path: Path) -> None:
    plain = fewbits.convert(tiny, tmp_path / "plain", "int4").path
    found = fewbits.convert(tiny, tmp_path / "mse", "int4", method="mse").path
    assert error(found, tiny) < error(plain, tiny)


def test_nothing_that_is_measured_is_calibrated_on(tiny: Path) -> None:
    tokenizer = fewbits.AutoTokenizer.from_pretrained(tiny)
    windows = calibration_windows(tokenizer)
    assert windows.shape == (WINDOWS, WINDOW_TOKENS)
    measured = {tuple(row) for row in token_windows(tokenizer).unfold(1, 64, 1).reshape(-1, 64).tolist()}
    assert not any(tuple(row) in measured for row in windows.unfold(1, 64, 1).reshape(-1, 64).tolist())


@pytest.mark.parametrize(
    ("to", "options", "message"),
    [
        ("int4", {"method": "best"}, "method 'best' is unknown; known: absmax, mse, gptq"),
        ("bf16", {"method": "gptq"}, "method='gptq': a cast to bf16 has no scales to find"),
        ("int4", {"method": "mse", "calibrate": "text"}, "calibrate: mse reads no text, gptq and smoothquant do"),
        ("int4", {"method": "gptq", "layout": "gguf"}, "method: GGUF types have one way to find their codes"),
        ("int4", {"calibrate": "gone.txt"}, "text file .*gone.txt does not exist"),
        ("int4", {"calibrate": "short"}, "calibrate: .*short.txt has [0-9]+ tokens, and one window has 128"),
    ],
)
def test_bad_input(tiny: Path, tmp_path: Path, text: Path, to: str, options: dict, message: str) -> None:
    (tmp_path / "short.txt").write_text("hello")
    named = {"text": text, "short": tmp_path / "short.txt", "gone.txt": tmp_path / "gone.txt"}
    if "calibrate" in options:
        options = {**options, "calibrate": named[options["calibrate"]]}
    with pytest.raises(FewbitsError, match=message):
        fewbits.convert(tiny, tmp_path / "out", to, **options)
    assert not (tmp_path / "out").exists()


def test_a_calibration_that_is_not_finite_names_the_layer(tiny: Path, tmp_path: Path, text: Path) -> None:
    plain = load(tiny, precision="fp32")
    plain.model.layers[0].mlp.down_proj.weight.data *= 1e38
    plain.save_pretrained(tmp_path / "huge")
    fewbits.AutoTokenizer.from_pretrained(tiny).save_pretrained(tmp_path / "huge")
    with pytest.raises(FewbitsError, match=r"model\.layers\.\d\.\w+\.\w+_proj\.weight: the calibration gave"):
        fewbits.convert(tmp_path / "huge", tmp_path / "out", "int8", calibrate=text)
    assert not (tmp_path / "out").exists()


def test_a_model_of_two_stacks_is_refused(tmp_path: Path, text: Path) -> None:
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(vocab_size=320, d_model=32, d_kv=8, d_ff=64, num_layers=1, num_heads=4)
    T5ForConditionalGeneration(config).save_pretrained(tmp_path / "t5")
    with pytest.raises(FewbitsError, match="has no tokenizer to read text with"):
        fewbits.convert(tmp_path / "t5", tmp_path / "out", "int8", calibrate=text)
