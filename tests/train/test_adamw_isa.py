"""The sweep on every instruction set, forced in a process of its own: always the bits of its plain meaning."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).with_name("test_adamw.py")


@pytest.mark.parametrize("isa", ["scalar", "avx2", "none"])
def test_the_sweep_with_a_forced_instruction_set(isa: str) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(TESTS)]
    command += ["-k", "bit_for_bit or split_and_join"]
    done = subprocess.run(command, env={**os.environ, "FEWBITS_ISA": isa}, capture_output=True, text=True, check=False)
    if "this CPU does not have it" in done.stdout or "not one of scalar" in done.stdout:
        pytest.skip(f"this machine has no {isa}")
    assert done.returncode == 0, done.stdout
    assert " passed" in done.stdout
