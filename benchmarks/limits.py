"""What the machine allows: how fast it reads memory, and how fast it multiplies in int8.

A token that is written reads every weight once: bytes of the weights over the read bandwidth is the least time of it.
A prompt of T tokens takes 2 · T operations a weight: over the rate of an int8 product, the least time of that.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

BITS = {
    "fewbits int8": 8.0,
    "fewbits int4": 4.125,
    "llama.cpp Q8_0": 8.5,
    "llama.cpp Q4_0": 4.5,
    "CTranslate2 int8": 8.0,
    "torchao W8A8 compiled": 8.0,
    "bitsandbytes int8": 8.0,
    "transformers bf16": 16.0,
}
"""Bits a weight, scales included where they matter."""


def probe(threads: int) -> dict[str, float]:
    """Bytes read and int8 operations done, each per second; the best of a few tries."""
    import torch

    torch.set_num_threads(threads)
    memory = torch.ones(2**28)  # 1 GiB, far more than the caches hold
    a, b = (torch.randint(-127, 128, (2048, 2048), dtype=torch.int8) for _ in range(2))
    return {
        "read_bytes_per_s": memory.nbytes / best_seconds(memory.sum, 4),
        "int8_ops_per_s": 2 * 2048**3 / best_seconds(lambda: torch._int_mm(a, b), 6),
    }


def best_seconds(run: Callable[[], object], times: int) -> float:
    """The least time of several calls."""
    found = []
    for _ in range(times):
        started = time.perf_counter()
        run()
        found.append(time.perf_counter() - started)
    return min(found)


def weights_of_a_token(model: Path) -> int:
    """How many weights one written token reads: its matrices, the embedding only where it is the head."""
    from safetensors import safe_open

    sizes: dict[str, int] = {}
    for file in model.glob("*.safetensors"):
        with safe_open(file, "pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 - not a dict
                shape = tensors.get_slice(name).get_shape()
                if len(shape) == 2:
                    sizes[name] = shape[0] * shape[1]
    tied = not any("lm_head" in name or "output_layer" in name for name in sizes)
    return sum(size for name, size in sizes.items() if tied or "embed" not in name)
