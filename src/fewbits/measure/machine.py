"""The machine that a figure was measured on: no figure without it."""

from __future__ import annotations

import os
import platform
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import psutil
import torch

_PACKAGES = ("fewbits", "torch", "transformers", "accelerate", "safetensors", "gguf", "numpy")


@dataclass(frozen=True)
class Gpu:
    """A CUDA device."""

    name: str
    memory_bytes: int
    capability: str
    """Compute capability, such as 9.0."""


@dataclass(frozen=True)
class Machine:
    """What runs the models here, as `fewbits doctor` shows it and as results are stamped with it."""

    versions: dict[str, str]
    """Python and the packages that matter, by name."""
    system: str
    cpu: str
    cores: int
    """Logical cores that this process may use."""
    threads: int
    """Threads that PyTorch, and with it fewbits, computes on."""
    memory_bytes: int
    """RAM of the machine, or of the container where that is less."""
    available_bytes: int
    """RAM that a program can still take without swapping."""
    gpus: tuple[Gpu, ...]
    isa: str
    """Instruction set of the live kernels: avx512, avx2, scalar, or none."""
    isa_reason: str

    def to_json(self) -> dict[str, Any]:
        """Plain data for a JSON file."""
        return {**vars(self), "versions": dict(self.versions), "gpus": [vars(gpu) for gpu in self.gpus]}


def this_machine() -> Machine:
    """Look at the machine, now.

    Raises:
        FewbitsError: `FEWBITS_ISA` asks for an instruction set that the CPU does not have.
    """
    from fewbits.kernels import native  # loads the compiled module, which is what is asked here

    kernels = native.status()
    memory = psutil.virtual_memory()
    limit, used = _container_memory()
    total = min(memory.total, limit) if limit else memory.total
    return Machine(
        versions={"python": platform.python_version(), **_package_versions()},
        system=f"{platform.system()} {platform.release()} {platform.machine()}",
        cpu=_cpu_name(),
        cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        threads=torch.get_num_threads(),
        memory_bytes=total,
        available_bytes=min(memory.available, total - used) if limit else memory.available,
        gpus=_gpus(),
        isa=kernels.isa,
        isa_reason=kernels.reason,
    )


def _package_versions() -> dict[str, str]:
    found = {}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    # The package's own word also says which build it is, +cpu or +cu130; its metadata may leave that out.
    return {**found, "torch": str(torch.__version__)}


def _cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")  # platform.processor() is empty or "x86_64" on Linux
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            key, _, value = line.partition(":")
            if key.strip() in ("model name", "Model"):
                return value.strip()
    return platform.processor() or platform.machine()


def _container_memory(root: Path = Path("/sys/fs/cgroup")) -> tuple[int, int]:
    """Bytes of the container's memory limit and of its use; (0, 0) without a limit.

    The kernel reports the host's RAM inside a container too, and ends the process at the container's limit.
    """
    try:
        limit = int((root / "memory.max").read_text())  # cgroup v2; "max" means none
        return limit, int((root / "memory.current").read_text())
    except (OSError, ValueError):
        return 0, 0


def _gpus() -> tuple[Gpu, ...]:
    if not torch.cuda.is_available():
        return ()
    found = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    return tuple(Gpu(gpu.name, gpu.total_memory, f"{gpu.major}.{gpu.minor}") for gpu in found)
