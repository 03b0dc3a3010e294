"""Quantized models copied, pickled, moved and brought to another dtype: codes and scales stay what they are."""

import copy
import multiprocessing
import pickle
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_families import FAMILIES, output
from torch import nn

from fewbits.models.experts import QuantExperts
from fewbits.models.linear import QuantLinear

Saved = Callable[..., Path]
NAMES = pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3", "t5", "bert-classifier", "mixtral"])
PRECISIONS = pytest.mark.parametrize("precision", ["int8", "int8-weight", "int4", "nf4", "mxfp4", "fp8"])


def load(saved: Saved, name: str, precision: str = "int8", **options: Any) -> Any:
    return FAMILIES[name].ours.from_pretrained(saved(name), precision=precision, **options)


def codes_and_scales(model: nn.Module) -> dict[str, torch.Tensor]:
    owners = {path for path, each in model.named_modules() if isinstance(each, (QuantLinear, QuantExperts))}
    return {name: tensor for name, tensor in model.state_dict().items() if name.rpartition(".")[0] in owners}


@PRECISIONS
@NAMES
def test_copies(saved: Saved, name: str, precision: str) -> None:
    model = load(saved, name, precision)
    expected = output(name, model)
    assert torch.equal(output(name, copy.deepcopy(model)), expected)
    assert torch.equal(output(name, pickle.loads(pickle.dumps(model))), expected)
    state = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    for tensor in model.state_dict(keep_vars=True).values():
        tensor.detach().zero_()
    for module in model.modules():
        if isinstance(module, (QuantLinear, QuantExperts)):
            for buffer in module.buffers(recurse=False):
                buffer.zero_()
    assert not torch.equal(output(name, model), expected)
    model.load_state_dict(state)
    assert torch.equal(output(name, model), expected)


def test_the_state_is_what_a_layer_is_whatever_the_memory_looks_like(saved: Saved) -> None:
    layer = load(saved, "llama").model.layers[0].mlp.up_proj
    assert layer.packed
    state = layer.state_dict()
    assert {name: (tensor.dtype, tensor.shape) for name, tensor in state.items()} == {
        "weight": (torch.int8, (96, 64)),
        "weight_scale": (torch.float32, (96, 1)),
    }


def _in_worker(pickled: bytes, path: list[str], answers: Any) -> None:
    sys.path[:] = path
    torch.set_num_threads(1)
    answers.put(output("llama", pickle.loads(pickled)).tolist())


def test_in_another_process(saved: Saved) -> None:
    model = load(saved, "llama")
    spawn = multiprocessing.get_context("spawn")
    answers = spawn.Queue()
    worker = spawn.Process(target=_in_worker, args=(pickle.dumps(model), sys.path, answers))
    worker.start()
    got = torch.tensor(answers.get(timeout=60))
    worker.join(10)
    assert worker.exitcode == 0
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as there: attention adds up its positions by threads
    try:
        assert torch.equal(got, output("llama", model))
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@PRECISIONS
@pytest.mark.parametrize("name", ["gpt2", "gemma3", "mixtral"])
def test_another_dtype_leaves_codes_and_scales_alone(
    saved: Saved, name: str, precision: str, dtype: torch.dtype
) -> None:
    model = load(saved, name, precision)
    before, expected = codes_and_scales(model), output(name, model)
    model.to(dtype)
    for key, tensor in codes_and_scales(model).items():
        assert tensor.dtype == before[key].dtype
        assert torch.equal(tensor, before[key])
    got = output(name, model)
    assert got.dtype == dtype
    # Where activations are quantized, 16 bits more or less carry some across a step.
    assert (got.float() - expected).norm() < 0.15 * expected.norm()
    with_float = output(name, model.to(torch.float32))
    assert with_float.dtype == torch.float32
    assert (with_float - expected).norm() < 0.15 * expected.norm()


@PRECISIONS
def test_to_float_and_back_nothing_changes(saved: Saved, precision: str) -> None:
    model = load(saved, "qwen2", precision, dtype=torch.float32)
    expected = output("qwen2", model)
    assert torch.equal(output("qwen2", model.to("cpu").to(torch.float32)), expected)


def test_a_layer_by_itself(saved: Saved) -> None:
    layer = load(saved, "qwen2").model.layers[0].self_attn.q_proj
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(0))
    expected = layer(x)
    for bring in (layer.half, layer.bfloat16, layer.double, layer.float):
        assert torch.equal(bring()(x), expected)
        assert layer.bias.dtype == layer.weight_scale.dtype == torch.float32
    assert layer(x.double()).dtype == torch.float64


@PRECISIONS
@pytest.mark.parametrize("name", ["gpt2", "gemma3", "mixtral"])
def test_to_meta_and_back_to_memory(saved: Saved, name: str, precision: str) -> None:
    model = load(saved, name, precision)
    expected, state = output(name, model), model.state_dict()
    model.to("meta")
    assert all(tensor.is_meta for tensor in model.state_dict().values())
    assert {key: tensor.shape for key, tensor in model.state_dict().items()} == {
        key: tensor.shape for key, tensor in state.items()
    }
    buffers = {key: buffer for key, buffer in load(saved, name, precision).named_buffers() if key not in state}
    model.to_empty(device="cpu")
    model.load_state_dict(state)
    for key, buffer in buffers.items():  # such as the rotary frequencies, which are in no state
        model.get_buffer(key).copy_(buffer)
    assert torch.equal(output(name, model), expected)


def test_only_what_is_not_quantized_counts_as_parameters(saved: Saved) -> None:
    model = load(saved, "llama")
    assert sum(parameter.numel() for parameter in model.parameters()) == 320 * 64 + 5 * 64
    assert model.num_parameters() == 320 * 64 + 5 * 64
    assert model.get_memory_footprint() < 0.5 * load(saved, "llama", "fp32").get_memory_footprint()
