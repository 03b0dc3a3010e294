"""The main job on a real model: convert SmolLM2-135M-Instruct to int8, see what it cost, let it answer."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors import safe_open

MODEL = Path(os.environ.get("FEWBITS_DEMO_MODEL", "~/.cache/fewbits/SmolLM2-135M-Instruct.Q4_1.gguf")).expanduser()
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not MODEL.exists(), reason=f"{MODEL} is absent: make demo fetches it"),
]

# What is imported once, and the model's code, is not the conversion's memory.
MEASURED = """
import sys
from pathlib import Path
import torch
from fewbits.measure.memory import peak_resident_bytes, resident_bytes
from fewbits.models.architecture import empty_model
from fewbits.models.source import open_source
from fewbits.quantize.convert import convert
source, out = sys.argv[1:]
empty_model(open_source(source).config, torch.float32)
if Path("/proc/self/clear_refs").exists():
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
before = resident_bytes()
convert(source, out)
print(peak_resident_bytes() - before)
"""


def fewbits(*arguments: object) -> str:
    done = subprocess.run([sys.executable, "-c", "from fewbits.cli import main; main()", *map(str, arguments)],
                          capture_output=True, text=True, check=False)  # fmt: skip
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def int8(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("smollm2") / "smollm2-int8"
    assert "model.layers" in fewbits("convert", MODEL, folder, "--to", "int8")
    return folder


def test_the_folder_holds_int8_layers(int8: Path) -> None:
    with safe_open(int8 / "model.safetensors", "pt") as file:
        stored = [file.get_slice(name).get_dtype() for name in file.keys()]  # noqa: SIM118
    assert stored.count("I8") == 30 * 7
    assert set(stored) == {"I8", "BF16"}


def test_what_it_cost(int8: Path, tmp_path: Path) -> None:
    table = fewbits("compare", MODEL, int8, "--json", tmp_path / "compare.json")
    rows = json.loads((tmp_path / "compare.json").read_text())["rows"]
    assert [row["precision"] for row in rows] == ["fp32", "bf16", "int8"]
    fp32, bf16, quantized = rows
    assert fp32["perplexity"] == pytest.approx(16.193, abs=0.02)  # digits cut one by one: see test_quality.py
    assert fp32["kl"] == 0
    assert 0 < bf16["kl"] < 0.005
    assert bf16["kl"] < quantized["kl"] <= 0.04
    assert quantized["top1"] > 0.9
    assert quantized["perplexity"] == pytest.approx(fp32["perplexity"], rel=0.05)
    assert 8 < quantized["bits_per_weight"] <= 8.1
    assert quantized["memory_bytes"] < 0.75 * bf16["memory_bytes"]
    assert quantized["disk_bytes"] < 0.65 * bf16["disk_bytes"]
    assert all(row["prefill_tps"] > row["decode_tps"] > 0 for row in rows)
    assert "16.19" in table


def test_it_answers(int8: Path) -> None:
    assert "Paris" in fewbits("generate", int8, "What is the capital of France?", "--max-new-tokens", 20)


def test_the_memory_of_a_conversion(tmp_path: Path) -> None:
    command = [sys.executable, "-c", MEASURED, MODEL, tmp_path / "out"]
    grown = int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert 0 < grown <= 300e6
