"""Whole models on a GPU beside the same models on the CPU."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import fewbits
from fewbits.models.linear import QuantHead, QuantLinear
from fewbits.models.precision import PRECISIONS
from fewbits.tensors.quantized import quantize_per_channel

pytestmark = pytest.mark.cuda
Saved = Callable[..., Path]
QUANTIZED = [name for name, precision in PRECISIONS.items() if not precision.cast]
IDS = torch.arange(40).view(2, 20) * 7 % 300 + 3


def load(folder: Path, precision: str, **kwargs: Any) -> Any:
    return fewbits.AutoModelForCausalLM.from_pretrained(folder, precision=precision, **kwargs)


@pytest.mark.parametrize("precision", list(PRECISIONS))
def test_logits_are_those_of_the_cpu(saved: Saved, precision: str) -> None:
    with torch.no_grad():
        expected = load(saved("llama"), precision)(IDS).logits.float()
        got = load(saved("llama"), precision, device_map="cuda")(IDS.cuda()).logits.cpu().float()
    # Activations that another order of additions carries across a step of their codes; bf16 rounds at every step.
    assert (got - expected).norm() < 0.02 * expected.norm()


@pytest.mark.parametrize("precision", QUANTIZED)
def test_codes_alone_are_placed(saved: Saved, precision: str) -> None:
    on_cpu = load(saved("llama"), precision)
    before = torch.cuda.memory_allocated()
    model = load(saved("llama"), precision, device_map="cuda")
    taken = torch.cuda.memory_allocated() - before
    state = on_cpu.state_dict()
    stored = sum(tensor.nbytes for tensor in state.values())
    assert {tensor.device.type for tensor in model.state_dict().values()} == {"cuda"}
    assert taken <= stored + 512 * (len(state) + 64), "the allocator rounds each tensor up to 512 bytes"


@pytest.mark.parametrize("precision", QUANTIZED)
def test_there_and_back_gives_the_same_codes(saved: Saved, precision: str) -> None:
    model = load(saved("llama"), precision)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    expected = model(IDS).logits
    model.to("cuda")
    assert all(tensor.is_cuda for tensor in model.state_dict().values())
    model.to("cpu")
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor.view(torch.uint8), before[name].view(torch.uint8)), name
    assert torch.equal(model(IDS).logits, expected)


@pytest.mark.parametrize("precision", QUANTIZED)
def test_a_decode_step_in_a_cuda_graph(saved: Saved, precision: str) -> None:
    from transformers import StaticCache

    model = load(saved("llama"), precision, device_map="cuda", dtype=torch.bfloat16)
    cache = StaticCache(config=model.config, max_cache_len=64)
    token, place = torch.tensor([[7]], device="cuda"), torch.tensor([20], device="cuda")

    def step() -> torch.Tensor:
        logits: torch.Tensor = model(
            token, past_key_values=cache, cache_position=place, position_ids=place[None], use_cache=True
        ).logits
        return logits

    with torch.no_grad():
        model(IDS[:1].cuda(), past_key_values=cache, cache_position=torch.arange(20, device="cuda"), use_cache=True)
        expected = step()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = step()
        graph.replay()
    assert torch.allclose(captured.float(), expected.float(), rtol=0.02, atol=0.02)


@pytest.mark.parametrize("precision", QUANTIZED)
def test_generate(saved: Saved, precision: str) -> None:
    model = load(saved("llama"), precision, device_map="cuda")
    written = model.generate(IDS[:1].cuda(), max_new_tokens=5, min_new_tokens=5, do_sample=False)
    assert written.shape == (1, 25)
    assert written.is_cuda


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_generate_compiled_with_a_static_cache(saved: Saved, precision: str) -> None:
    model = load(saved("llama"), precision, device_map="cuda")
    arguments: Any = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}
    expected = model.generate(IDS[:1].cuda(), **arguments)
    got = model.generate(IDS[:1].cuda(), cache_implementation="static", **arguments)
    assert torch.equal(got[:, :21], expected[:, :21]), "the first token needs no luck"


@pytest.mark.parametrize("kind", [QuantLinear, QuantHead])
@pytest.mark.parametrize("M", [1, 100])
def test_a_layer_moved_to_the_gpu(kind: type[QuantLinear], M: int) -> None:
    generator = torch.Generator().manual_seed(0)
    layer = kind(quantize_per_channel(torch.randn(96, 64, generator=generator)), torch.randn(96, generator=generator))
    x = torch.randn(M, 64, generator=generator)
    expected = layer(x)
    layer.to("cuda")
    assert not layer.packed
    assert torch.equal(layer(x.cuda()).cpu(), expected), "sums of integers, rounded alike"
    assert torch.equal(layer.to("cpu")(x), expected)


def test_gradients_flow_through(saved: Saved) -> None:
    layer = QuantLinear(quantize_per_channel(torch.randn(96, 64, generator=torch.Generator().manual_seed(0))))
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(1))
    gradients = []
    for device in ("cpu", "cuda"):
        leaf = x.to(device).requires_grad_()
        layer.to(device)(leaf).sum().backward()
        assert leaf.grad is not None
        gradients.append(leaf.grad.cpu())
    assert torch.allclose(*gradients, rtol=1e-5, atol=1e-5)
