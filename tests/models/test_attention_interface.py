"""Models that attend by the op, beside the same ones with transformers' sdpa."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_families import FAMILIES, agree
from torch import Tensor
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from fewbits.kernels import native
from fewbits.models import attention as interface
from fewbits.models.attention import attend, use_attention

pytestmark = pytest.mark.skipif(not native.status().loaded, reason="there are no compiled kernels")

Saved = Callable[..., Path]
IDS = torch.arange(3, 43).view(2, 20)
BY_OP = ("gemma3", "phi3", "gpt2", "opt", "mixtral", "qwen2-moe", "bert", "nomic-bert")


class Module(torch.nn.Module):
    """What an attention function looks at."""

    is_causal = True
    num_key_value_groups = 2


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many queries each call of the op has had."""
    found: list[int] = []
    run = interface.attention

    def recorded(query: Tensor, *args: Any) -> Tensor:
        found.append(query.shape[2])
        return run(query, *args)

    monkeypatch.setattr(interface, "attention", recorded)
    return found


def load(saved: Saved, name: str, **options: Any) -> Any:
    return FAMILIES[name].ours.from_pretrained(saved(name), precision="int8", **options)


def by_sdpa(model: Any) -> Any:
    again = copy.deepcopy(model)
    again.set_attn_implementation("sdpa")
    return again


@pytest.mark.parametrize("name", BY_OP)
@pytest.mark.parametrize("T", [1, 9])
def test_few_tokens(saved: Saved, runs: list[int], name: str, T: int) -> None:
    model = load(saved, name)
    assert use_attention(model) or model.config._attn_implementation == "fewbits"
    with torch.no_grad():
        got = model(IDS[:, :T])
        assert runs == [T, T]
        expected = by_sdpa(model)(IDS[:, :T])
    assert runs == [T, T]
    assert agree(got[0], expected[0])


@pytest.mark.parametrize("name", [name for name in BY_OP if "bert" not in name])
@pytest.mark.parametrize("beams", [1, 2])
def test_it_writes_the_same(saved: Saved, runs: list[int], name: str, beams: int) -> None:
    model = load(saved, name)
    use_attention(model)
    mask = torch.ones_like(IDS)
    mask[1, :6] = 0  # a shorter text, padded on the left
    asked = {"attention_mask": mask, "max_new_tokens": 8, "do_sample": False, "num_beams": beams}
    got = model.generate(IDS, **asked)
    assert set(runs) == {1}
    assert torch.equal(got, by_sdpa(model).generate(IDS, **asked))


def test_an_implementation_that_is_asked_for_is_used(saved: Saved, runs: list[int]) -> None:
    for name in ("sdpa", "eager"):
        model = load(saved, "phi3", attn_implementation=name)
        assert model.config._attn_implementation == name
        model(IDS[:, :3])
    assert runs == []


def test_models_that_do_not_go_through_the_interface_stay(saved: Saved) -> None:
    model = load(saved, "bloom")
    assert not use_attention(model)
    assert model.config._attn_implementation != "fewbits"


def test_it_is_compiled_without_breaks(saved: Saved) -> None:
    model = load(saved, "phi3")
    use_attention(model)
    asked = {"use_cache": False}
    with torch.no_grad():
        expected = model(IDS[:, :5], **asked).logits
        compiled = torch.compile(model, fullgraph=True, backend="eager")
        got = compiled(IDS[:, :5], **asked).logits
    assert agree(got, expected)


def test_what_the_op_cannot_do_sdpa_does(runs: list[int]) -> None:
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(2, n, 3, 8, generator=generator) for n in (4, 2, 2))
    module, added = Module(), torch.zeros(2, 1, 3, 3)
    cases: list[tuple[tuple[Tensor, ...], dict[str, Any]]] = [
        ((query, key, value), {"attention_mask": added}),
        ((query, key, value), {"attention_mask": added[:, :, :, :3] == 1, "position_bias": torch.randn(1, 4, 3, 3)}),
        ((query.half(), key.half(), value.half()), {"attention_mask": None}),
        ((query.requires_grad_(), key, value), {"attention_mask": None}),
        ((query.detach(), key, value[..., :4]), {"attention_mask": None}),
        ((query.detach(), key.repeat(1, 1, 2, 1), value.repeat(1, 1, 2, 1)), {"attention_mask": None}),
    ]
    for tensors, kwargs in cases:
        got, _ = attend(module, *tensors, **kwargs)
        assert torch.equal(got, sdpa_attention_forward(module, *tensors, **kwargs)[0])
    many = [torch.randn(1, n, 17, 8, generator=generator) for n in (4, 2, 2)]
    attend(module, *many, attention_mask=None)
    assert attend(module, *(each.detach() for each in (query, key, value)), None, dropout=0.5)[0].shape == (2, 3, 4, 8)
    with pytest.raises(ValueError, match="softcap"):
        attend(module, query.detach(), key, value, None, softcap=20.0)
    assert runs == []
    attend(module, query.detach(), key, value, None)
    assert runs == [3]
