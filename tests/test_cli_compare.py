"""`fewbits compare` on the command line: its options, what it prints, and what it refuses in one line."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

SMALL = ("--windows", 2, "--tokens", 32)


def test_precisions_beside_a_folder(run_cli: Callable, tiny: Path, tiny_int8: Path, tmp_path: Path) -> None:
    out, page = tmp_path / "cost.json", tmp_path / "cost.html"
    ran = run_cli("compare", tiny, tiny_int8, "--as", "int4,fp8", "--no-speed", *SMALL, "--json", out, "--report", page)
    assert (ran.code, ran.err) == (0, "")
    written = json.loads(out.read_text())
    assert [row["precision"] for row in written["rows"]] == ["fp32", "bf16", "int4", "fp8", "int8"]
    assert (written["windows"], written["window_tokens"], written["prompt_tokens"]) == (2, 32, None)
    assert all(row["decode_tps"] is row["peak_bytes"] is None for row in written["rows"])
    assert "KL to fp32" in ran.out
    assert "Where they differ most:" in ran.out
    assert "Note: The reference makes no sense of this text" in ran.out  # its weights are random
    assert "Speed:" not in ran.out
    assert "tiny-int8" in page.read_text()


def test_a_quantized_reference_alone_is_timed(run_cli: Callable, tiny_int8: Path) -> None:
    ran = run_cli("compare", tiny_int8, *SMALL)
    assert (ran.code, ran.err) == (0, "")
    assert "KL to int8" in ran.out
    assert "a prompt of 32 tokens, then 32 one at a time" in ran.out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--as", "int3"], "precision 'int3' is unknown"),
        (["--as", ""], "precision '' is unknown"),
        (["--windows", 0], "Invalid value for '--windows'"),
        (["--tokens", 1], "Invalid value for '--tokens'"),
        (["--tokens", 512], "windows of 512 tokens are longer than the context of tiny, 128 tokens"),
        (["--device", "tpu"], "device 'tpu' is none that models are compared on"),
        (["--report", "cost.txt"], "--report: cost.txt would be an HTML page"),
        (["--text", "absent.txt", "--tokens", 32], "text file absent.txt does not exist"),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, list) else "",
)
def test_bad_input_in_one_line(run_cli: Callable, tiny: Path, arguments: list, message: str) -> None:
    ran = run_cli("compare", tiny, *arguments)
    assert (ran.code, ran.out) == (2, "")
    assert message in ran.err
    assert ran.err.count("\n") == 1
