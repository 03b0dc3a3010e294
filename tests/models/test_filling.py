"""Tensors read when their turn comes: by several threads, in any order, and never more than a few at a time."""

import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
import transformers
from tiny_families import FAMILIES

from fewbits.models.filling import plain_tensors, quantized_tensors
from fewbits.models.manifest import fitted
from fewbits.models.naming import check_tensors
from fewbits.models.precision import PRECISIONS
from fewbits.models.quantizable import quantizable_weights
from fewbits.models.quantizer import Plan
from fewbits.models.source import open_source

Saved = Callable[..., Path]


def opened(saved: Saved, name: str) -> tuple:
    source = open_source(saved(name))
    with torch.device("meta"):
        empty = FAMILIES[name].theirs.from_config(source.config)
    shapes = {key: tensor.shape for key, tensor in source.tensors.items()}
    return source, empty, check_tensors(empty, shapes, source.path)


@pytest.mark.parametrize("name", ["llama", "mixtral", "gte"])
def test_plain_tensors_by_many_threads(saved: Saved, name: str) -> None:
    source, _, places = opened(saved, name)
    seen: list[tuple[int, int]] = []
    tensors = plain_tensors(source, places, torch.float32, lambda done, total: seen.append((done, total)))
    with ThreadPoolExecutor(8) as pool:
        read = dict(zip(tensors, pool.map(lambda tensor: tensor[...], tensors.values()), strict=True))
    assert all(torch.equal(read[key], source.read(key)) for key in source.tensors)
    assert seen == sorted(seen), "progress goes one way"
    assert seen[-1][0] == seen[-1][1] == sum(tensor.nbytes for tensor in source.tensors.values())


@pytest.mark.parametrize("precision", ["int8", "int4"])
@pytest.mark.parametrize("name", ["llama", "mixtral", "gte"])
def test_quantized_tensors_by_many_threads(saved: Saved, name: str, precision: str) -> None:
    source, empty, places = opened(saved, name)
    weights = frozenset(key for key, weight in quantizable_weights(empty).items() if not weight.reason)
    fits = fitted(empty, PRECISIONS[precision])
    plan = Plan(fits, weights, torch.bfloat16, torch.float32, torch.bfloat16)

    def read(threads: int) -> dict[str, torch.Tensor]:
        seen: list[int] = []
        tensors = quantized_tensors(source, empty, places, plan, lambda done, total: seen.append(done))
        with ThreadPoolExecutor(threads) as pool:
            found = dict(zip(tensors, pool.map(lambda tensor: tensor[...], tensors.values()), strict=True))
        assert seen[-1] == sum(tensor.nbytes for tensor in source.tensors.values())
        return found

    expected = read(1)
    assert {name for name in expected if name.endswith("_scale")} == {f"{name}_scale" for name in weights}
    found = read(8)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], tensor) for key, tensor in expected.items())


_MEASURE = """
import sys, torch, fewbits
torch.set_num_threads(1)
def status(key):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(key))
load = fewbits.AutoModelForCausalLM.from_pretrained
load(sys.argv[1], precision=sys.argv[3])
with open("/proc/self/clear_refs", "w") as file:
    file.write("5")
before = status("VmRSS")
model = load(sys.argv[2], precision=sys.argv[3])
print(status("VmHWM") - before, model.get_memory_footprint())
"""
_SCRATCH = 160 * 2**20  # pieces of 2²² weights in float32, about ten of them while one is quantized


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("name", ["llama", "mixtral"])
@pytest.mark.parametrize("precision", ["int8", "int4", "bf16"])
def test_the_peak_is_the_model_and_its_largest_tensor(saved: Saved, tmp_path: Path, name: str, precision: str) -> None:
    sizes = {"hidden_size": 1024, "intermediate_size": 2048, "num_hidden_layers": 6, "vocab_size": 24000}
    if name == "mixtral":
        sizes |= {"num_local_experts": 8, "num_hidden_layers": 3}
    config = transformers.AutoConfig.for_model(name, num_attention_heads=16, **sizes)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    largest = max(parameter.nbytes for parameter in model.parameters())
    model.save_pretrained(tmp_path)
    del model
    command = [sys.executable, "-W", "ignore", "-c", _MEASURE, str(saved(name)), str(tmp_path), precision]
    peak, size = map(int, subprocess.run(command, check=True, capture_output=True, text=True).stdout.split())
    assert size > 150 * 2**20 or precision != "bf16"
    assert peak <= size + largest + _SCRATCH
