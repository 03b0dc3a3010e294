"""The Triton kernels without a GPU: interpreted on the CPU, and compiled for GPUs that are not here.

Each in a process of its own. Where torch does not bring Triton it lies apart, in build/triton: transformers imports it
wherever it finds it, and takes 76 MiB more.
"""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

HERE = Path(__file__).parent
APART = Path(__file__).parents[2] / "build/triton"

pytestmark = pytest.mark.skipif(
    find_spec("triton") is None and not (APART / "triton").exists(),
    reason="Triton is not installed: it comes with torch for CUDA, and `make build/triton/made` puts it apart on Linux",
)


def run_apart(file: str, **environment: str) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "--noconftest", "-p", "no:cacheprovider", str(HERE / file)]
    path = os.pathsep.join([os.environ.get("PYTHONPATH", ""), *([] if find_spec("triton") else [str(APART)])])
    environment = {**os.environ, "PYTHONPATH": path.strip(os.pathsep), "CUDA_VISIBLE_DEVICES": "", **environment}
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stdout[-4000:] + ran.stderr[-1000:]


def test_the_kernels_interpreted() -> None:
    run_apart("triton_cases.py", TRITON_INTERPRET="1")


@pytest.mark.slow
def test_the_kernels_compiled() -> None:
    run_apart("triton_compiled.py")
