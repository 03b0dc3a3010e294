"""Models whose decoder layers run in one native call beside the same models module by module."""

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_families import FAMILIES
from torch import Tensor, nn
from transformers.models.llama import modeling_llama

from fewbits.kernels import native
from fewbits.models.fused import fuse, unfuse
from fewbits.models.fused_layer import FusedLayer
from fewbits.models.kv_cache import GrowingLayer
from fewbits.models.linear import QuantLinear

pytestmark = pytest.mark.skipif(not native.status().loaded, reason="there are no compiled kernels")

Saved = Callable[..., Path]
NAMES = pytest.mark.parametrize("name", ["llama", "mistral", "qwen2", "qwen3"])
IDS = torch.arange(3, 43).view(2, 20)


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The indices of the layers that the kernel has computed."""
    found: list[int] = []
    run = FusedLayer.run

    def recorded(layer: FusedLayer, *args: Any) -> Tensor:
        found.append(layer.index)
        return run(layer, *args)

    monkeypatch.setattr(FusedLayer, "run", recorded)
    return found


def load(saved: Saved, name: str = "llama", precision: str = "int8", **options: Any) -> Any:
    return FAMILIES[name].ours.from_pretrained(saved(name), precision=precision, **options)


def logits(model: Any, ids: Tensor = IDS, **kwargs: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(ids, **kwargs).logits
    return found


def close(got: Tensor, expected: Tensor) -> bool:
    """As far as sums in another order carry some activations across a step."""
    return bool((got - expected).norm() <= 1e-2 * expected.norm())


def divergence(reference: Tensor, candidate: Tensor) -> float:
    """Mean KL(reference ‖ candidate) of the next token, nats."""
    wanted, found = (each.double().log_softmax(-1) for each in (reference, candidate))
    return float((wanted.exp() * (wanted - found)).sum(-1).mean())


def by_modules(model: Any) -> Any:
    unfuse(model)
    return model


@NAMES
@pytest.mark.parametrize("beams", [1, 3])
def test_it_writes_the_same(saved: Saved, runs: list[int], name: str, beams: int) -> None:
    model = load(saved, name)
    mask = torch.ones_like(IDS)
    mask[1, :6] = 0  # a shorter text, padded on the left
    asked = {"attention_mask": mask, "max_new_tokens": 12, "do_sample": False, "num_beams": beams}
    got = model.generate(IDS, **asked)
    assert len(runs) == 2 * 12
    expected = by_modules(model).generate(IDS, **asked)
    assert torch.equal(got, expected)


def test_the_cache_of_generate_grows_in_place(saved: Saved) -> None:
    model = load(saved)
    found = model.generate(IDS[:1], max_new_tokens=3, return_dict_in_generate=True)
    assert {type(layer) for layer in found.past_key_values.layers} == {GrowingLayer}


def test_a_drafting_model_crops_the_cache(saved: Saved) -> None:
    model = load(saved)
    asked = {"max_new_tokens": 10, "do_sample": False}
    expected = model.generate(IDS[:1], **asked)
    assert torch.equal(model.generate(IDS[:1], assistant_model=copy.deepcopy(model), **asked), expected)


def test_names_and_kinds_stay(saved: Saved) -> None:
    model = load(saved)
    layer = model.model.layers[0]
    assert isinstance(layer, modeling_llama.LlamaDecoderLayer)
    assert type(layer).__name__ == "LlamaDecoderLayer"
    state = set(model.state_dict())
    assert unfuse(model) == 2
    assert type(layer) is modeling_llama.LlamaDecoderLayer
    assert set(model.state_dict()) == state
    assert fuse(model) == 2
    assert fuse(model) == 0


def test_copies(saved: Saved, runs: list[int]) -> None:
    model = load(saved)
    expected = logits(model)
    for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        runs.clear()
        assert torch.equal(logits(again), expected)
        assert runs == [0, 1]


def test_changes_are_seen(saved: Saved, runs: list[int]) -> None:
    model = load(saved, "qwen2")
    logits(model)
    first, second = model.model.layers
    first.mlp.up_proj, second.mlp.up_proj = second.mlp.up_proj, first.mlp.up_proj
    first.input_layernorm.weight.data = first.input_layernorm.weight * 2
    second.self_attn.q_proj.load_state_dict(first.self_attn.q_proj.state_dict())
    runs.clear()
    got = logits(model)
    assert runs == [0, 1]
    assert close(got, logits(by_modules(model)))


def test_hooks_are_called(saved: Saved, runs: list[int]) -> None:
    model = load(saved)
    logits(model)
    seen: list[torch.Size] = []
    hook = model.model.layers[0].mlp.down_proj.register_forward_hook(lambda module, args, out: seen.append(out.shape))
    runs.clear()
    logits(model)
    assert seen == [torch.Size([2, 20, 64])]
    assert runs == [1]
    hook.remove()
    logits(model)
    assert runs == [1, 0, 1]
    around = nn.modules.module.register_module_forward_pre_hook(lambda module, args: seen.append(type(module)))
    try:
        logits(model)
    finally:
        around.remove()
    assert QuantLinear in seen


def test_hidden_states_and_attentions_are_given(saved: Saved) -> None:
    model = load(saved, attn_implementation="eager")
    found = model(IDS, output_attentions=True, output_hidden_states=True)
    assert len(found.attentions) == 2
    assert len(found.hidden_states) == 3
    model.set_attn_implementation("sdpa")
    states = model(IDS, output_hidden_states=True).hidden_states
    assert all(close(ours, theirs) for ours, theirs in zip(states, found.hidden_states, strict=True))


def test_what_the_kernel_cannot_do_the_modules_do(saved: Saved, runs: list[int]) -> None:
    model = load(saved)
    logits(model, attention_mask=torch.zeros(2, 1, 20, 20))  # an additive one
    embedded = model.get_input_embeddings()(IDS).requires_grad_()
    model(inputs_embeds=embedded).logits.sum().backward()
    assert embedded.grad.abs().sum() > 0
    model.train()
    logits(model)
    model.eval()
    logits(model.to(torch.bfloat16))
    assert runs == []
    logits(model.to(torch.float32))
    assert runs == [0, 1]


@pytest.mark.parametrize("precision", ["int8", "int8-weight", "int4", "nf4", "mxfp4", "fp8"])
def test_every_quantized_precision_has_its_kernel(saved: Saved, runs: list[int], precision: str) -> None:
    model, original = load(saved, precision=precision), load(saved, precision="fp32")
    fused = logits(model)
    assert runs == [0, 1]
    modules = logits(by_modules(model))
    assert close(fused, modules)
    reference = logits(original)
    assert runs == [0, 1]
    assert divergence(reference, fused) == pytest.approx(divergence(reference, modules), rel=0.05)


def test_kept_layers_stay_in_modules(saved: Saved, runs: list[int]) -> None:
    model = load(saved, keep=["*layers.0*down_proj"])
    assert close(logits(model), logits(by_modules(copy.deepcopy(model))))
    assert runs == [1]


def test_several_turns_in_one_cache(saved: Saved) -> None:
    model = load(saved, "mistral", sliding_window=8)
    results = []
    for change in (fuse, unfuse):
        change(model)
        past, found = None, []
        for length in (5, 1, 6, 1, 20, 1, 1):
            with torch.no_grad():
                out = model(IDS[:, :length], past_key_values=past, use_cache=True)
            past = out.past_key_values
            found.append(out.logits)
        results.append(torch.cat(found, 1))
    assert close(*results)


def test_it_follows_a_change_of_path(saved: Saved) -> None:
    model = load(saved)
    expected = logits(model, IDS[:1])[:, -1]
    with torch.no_grad():
        past = model(IDS[:1, :8], use_cache=True).past_key_values
        unfuse(model)
        past = model(IDS[:1, 8:12], past_key_values=past).past_key_values
        fuse(model)
        found = model(IDS[:1, 12:], past_key_values=past).logits[:, -1]
    assert close(found, expected)
