"""Every instruction set in turn, forced in a process of its own, through all the tests of the kernels."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
FILES = (
    "test_ops.py",
    "test_rotation.py",
    "test_cast_kernels.py",
    "test_block_kernels.py",
    "test_int4_matmul.py",
    "test_weight_only_matmul.py",
    "test_decoder_layer.py",
    "test_attention.py",
    "test_int8_cache_kernel.py",
    "test_bad_input.py",
)
SHOW = "from fewbits.kernels import native; print(native.status().isa)"


def run(isa: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "FEWBITS_ISA": isa}
    return subprocess.run([sys.executable, *arguments], env=environment, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("isa", ["scalar", "avx2", "avx512", "none"])
def test_ops_with_a_forced_instruction_set(isa: str) -> None:
    shown = run(isa, "-c", SHOW)
    if "this CPU does not have it" in shown.stderr or "not one of scalar" in shown.stderr:
        pytest.skip(f"this machine has no {isa}")
    assert shown.stdout.strip() == isa
    tests = run(
        isa,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        *(str(HERE / name) for name in FILES),
    )
    assert tests.returncode == 0, tests.stdout
    assert " passed" in tests.stdout


def test_an_unknown_instruction_set_is_refused() -> None:
    shown = run("sse9", "-c", SHOW)
    assert shown.returncode != 0
    assert "FEWBITS_ISA=sse9: not one of scalar, avx2, avx512 on this machine; unset it" in shown.stderr


def test_missing_kernels_are_said_once_and_results_stay_right() -> None:
    script = """
import sys, warnings
sys.modules["fewbits.kernels._native"] = None
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import torch
    from fewbits.kernels import native, ops
    codes, scales = ops.quantize_per_token(torch.tensor([[127.0, 1.0]]))
    native.status()
assert codes.tolist() == [[127, 1]], codes
print(native.status().isa, sum("without its compiled kernels" in str(w.message) for w in caught))
"""
    shown = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert shown.stdout.split() == ["none", "1"], shown.stderr
