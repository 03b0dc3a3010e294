"""A decoder layer in one native call beside its modules. ``test_isa.py`` runs this file for every instruction set."""

import multiprocessing
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import cycle
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers import DynamicCache

from fewbits.kernels import native
from fewbits.models.fused import fuse, unfuse
from fewbits.models.fused_layer import FusedLayer
from fewbits.models.linear import QuantLinear
from fewbits.tensors.quantized import quantize_weight

pytestmark = pytest.mark.skipif(not native.status().loaded, reason="there are no compiled kernels")

SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 32,
    "attn_implementation": "sdpa",
}
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "every head its own": ("llama", {"num_key_value_heads": 4, "attention_bias": True, "mlp_bias": True}),
    "one key head": ("llama", {"hidden_size": 68, "num_attention_heads": 17, "num_key_value_heads": 1, "head_dim": 6}),
    "odd": ("llama", {"hidden_size": 54, "intermediate_size": 37, "num_attention_heads": 6, "head_dim": 10}),
    "wide": ("llama", {"head_dim": 160, "hidden_size": 76}),
    "mistral": ("mistral", {"sliding_window": 5}),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {"head_dim": 24}),
    "glm": ("glm", {"head_dim": 32, "attention_bias": True}),
}
EVERY = pytest.mark.parametrize("kind", KINDS)

Weights = tuple[str, str | None, int | None, int]
"""Format of weights, of activations, group size, block that is rotated."""

INT8: Weights = ("int8", "int8", None, 0)
WEIGHTS: dict[str, list[Weights]] = {
    "rotated int8": [("int8", "int8", None, 32)],
    "int4": [("int4", "int8", 32, 0)],
    "int4, a channel a group": [("int4", "int8", None, 0)],
    "int4, floats": [("int4", None, 32, 0)],
    "int8, floats": [("int8", None, 32, 0)],
    "nf4": [("nf4", None, 32, 0)],
    "mxfp4": [("e2m1fn", None, 32, 0)],
    "fp8": [("e4m3fn", "e4m3fn", None, 0)],
    "fp8, floats": [("e4m3fn", None, None, 0)],
    "one of each": [
        INT8, ("int4", "int8", 32, 0), ("nf4", None, 32, 0), ("e4m3fn", "e4m3fn", None, 0), ("int8", None, 32, 0),
        ("int8", "int8", None, 32), ("int4", "int8", None, 32),
    ],
}  # fmt: skip


@pytest.fixture(autouse=True)
def no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def make(kind: str, weights: Sequence[Weights] = (INT8,)) -> Any:
    """A model of one layer, whose linear layers have these weights in turn."""
    torch.manual_seed(0)
    model_type, changes = KINDS[kind]
    config = transformers.AutoConfig.for_model(model_type, **(SIZES | {"pad_token_id": 0} | changes))
    model = transformers.AutoModel.from_config(config, dtype=torch.float32).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, 1.0 if parameter.ndim == 1 else 0.0, 0.2)
    linears = [(path, module) for path, module in model.named_modules() if type(module) is nn.Linear]
    for (path, module), (name, activations, group, rotation) in zip(linears, cycle(weights), strict=False):
        weight = quantize_weight(module.weight, name, group_size=group, rotation=rotation)
        model.set_submodule(path, QuantLinear(weight, module.bias, activations=activations))
    return model.requires_grad_(False)


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def assert_close(got: Tensor, expected: Tensor) -> None:
    """Sums of another order put some activations on the other side of a step: a few steps of 1 / 127, no more."""
    assert got.shape == expected.shape
    assert torch.equal(got.isnan(), expected.isnan())
    error, size = (got - expected).nan_to_num(), expected.nan_to_num()
    assert error.norm() <= 1e-2 * size.norm()
    assert error.abs().max() <= 5e-2 * size.abs().max()


class Both:
    """A model's layer, called through its modules and through the kernel, each with a cache of its own."""

    def __init__(self, kind: str, monkeypatch: pytest.MonkeyPatch, weights: Sequence[Weights] = (INT8,)) -> None:
        self.model = make(kind, weights)
        self.caches = [DynamicCache(config=self.model.config) for _ in range(2)]
        self.runs = 0
        run = FusedLayer.run

        def counted(layer: FusedLayer, *args: Any) -> Tensor:
            self.runs += 1
            return run(layer, *args)

        monkeypatch.setattr(FusedLayer, "run", counted)

    def __call__(self, x: Tensor, *, cached: bool = True, **kwargs: Any) -> tuple[Tensor, Tensor]:
        results = []
        for change, cache in zip((unfuse, fuse), self.caches, strict=True):
            change(self.model)
            past = cache if cached else None
            results.append(
                self.model(inputs_embeds=x, past_key_values=past, use_cache=cached, **kwargs).last_hidden_state
            )
        return results[1], results[0]


@EVERY
@pytest.mark.parametrize(("B", "T"), [(1, 1), (1, 2), (3, 1), (5, 1), (2, 17), (1, 70), (2, 300), (1, 600)])
def test_a_prompt(kind: str, B: int, T: int, monkeypatch: pytest.MonkeyPatch) -> None:
    both = Both(kind, monkeypatch)
    got, expected = both(random(B, T, both.model.config.hidden_size), cached=False)
    assert_close(got, expected)
    error = (got - expected).norm(dim=-1) / expected.norm(dim=-1)
    assert error.median() <= 1e-5, "no activation of most tokens is near the middle of a step"
    assert both.runs == 1


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("kind", ["qwen2", "glm"])
def test_weights_of_every_kind(kind: str, weights: str, monkeypatch: pytest.MonkeyPatch) -> None:
    both = Both(kind, monkeypatch, WEIGHTS[weights])
    for T in (1, 1, 2, 5, 17, 260):
        got, expected = both(random(2, T, both.model.config.hidden_size))
        assert_close(got, expected)
        error = (got - expected).norm(dim=-1) / expected.norm(dim=-1)
        assert error.median() <= 1e-5, "no activation of most tokens is near the middle of a step"
    assert both.runs == 6


@pytest.mark.parametrize("weights", WEIGHTS)
def test_a_bad_token_meets_weights_of_every_kind(weights: str, monkeypatch: pytest.MonkeyPatch) -> None:
    both = Both("llama", monkeypatch, WEIGHTS[weights])
    x = random(3, 1, 64)
    x[1, 0, 3] = torch.nan
    got, _ = both(x, cached=False)
    assert got[1].isnan().all()
    clean, _ = both(x.nan_to_num(), cached=False)
    assert torch.equal(got[[0, 2]], clean[[0, 2]])


@EVERY
@pytest.mark.parametrize("past", [1, 4, 63, 64, 65, 300])
def test_tokens_after_a_prompt(kind: str, past: int, monkeypatch: pytest.MonkeyPatch) -> None:
    both = Both(kind, monkeypatch)
    H = both.model.config.hidden_size
    for T in (past, 1, 1, 3, 1, 20, 1):
        assert_close(*both(random(2, T, H)))
    assert both.runs == 7
    ours, theirs = both.caches[1].layers[0], both.caches[0].layers[0]
    assert ours.get_seq_length() == theirs.get_seq_length() == past + 27
    assert_close(ours.keys, theirs.keys)
    assert_close(ours.values, theirs.values)


@EVERY
def test_texts_padded_on_the_left(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    both = Both(kind, monkeypatch)
    H, mask = both.model.config.hidden_size, torch.ones(3, 40, dtype=torch.int64)
    mask[1, :9], mask[2, :39] = 0, 0
    for T in (40, 1, 2, 20):
        visible = torch.cat([mask, torch.ones(3, both.caches[0].get_seq_length() + T - 40, dtype=torch.int64)], 1)
        positions = (visible.cumsum(1) - 1).clamp_min(0)[:, -T:]
        got, expected = both(random(3, T, H), attention_mask=visible, position_ids=positions)
        real = visible[:, -T:].bool()
        assert_close(got[real], expected[real])
    assert both.runs == 4


@pytest.mark.parametrize("T", [1, 30])
def test_a_bad_text_spoils_no_other(T: int, monkeypatch: pytest.MonkeyPatch) -> None:
    both = Both("llama", monkeypatch)
    x = random(3, T, 64)
    x[1, 0, 3] = torch.nan
    got, _ = both(x, cached=False)
    assert got[1].isnan().all()
    clean, _ = both(x.nan_to_num(), cached=False)
    assert torch.equal(got[[0, 2]], clean[[0, 2]])


def test_a_bad_token_is_seen_by_later_ones_only(monkeypatch: pytest.MonkeyPatch) -> None:
    both = Both("llama", monkeypatch)
    x = random(1, 300, 64)
    x[0, 200, 3] = torch.inf
    got, _ = both(x, cached=False)
    assert got[0, :200].isfinite().all()
    assert got[0, 200:].isnan().all()


def test_no_texts() -> None:
    model = make("llama")
    fuse(model)
    assert model(inputs_embeds=torch.empty(0, 3, 64), use_cache=False).last_hidden_state.shape == (0, 3, 64)


@pytest.mark.parametrize("threads", [1, 2, 3, 8])
@pytest.mark.parametrize("T", [1, 3, 90])
def test_any_number_of_threads(threads: int, T: int, monkeypatch: pytest.MonkeyPatch) -> None:
    both = Both("wide", monkeypatch)
    both(random(1, 100, 76))
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for _ in range(3):
            assert_close(*both(random(1, T, 76)))
    finally:
        torch.set_num_threads(before)


def test_several_python_threads_at_once() -> None:
    model, x = make("llama"), random(2, 20, 64)
    fuse(model)
    expected = model(inputs_embeds=x, use_cache=False).last_hidden_state

    def work(_: int) -> bool:
        with torch.no_grad():
            return torch.equal(model(inputs_embeds=x, use_cache=False).last_hidden_state, expected)

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(work, range(40)))


def _in_child(model: Any, x: Tensor, answers: Any) -> None:
    torch.set_num_threads(1)  # PyTorch's own operations do not survive a fork with more
    layer = FusedLayer.of(model.layers[0])
    assert layer is not None
    with torch.no_grad(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "get_num_threads", lambda: 2)  # ours do
        answers.put(model(inputs_embeds=x, use_cache=False).last_hidden_state.tolist())


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of fork in a process with threads
def test_after_a_fork() -> None:
    model, x = make("wide"), random(1, 50, 76)
    fuse(model)
    expected = model(inputs_embeds=x, use_cache=False).last_hidden_state
    fork = multiprocessing.get_context("fork")
    answers = fork.Queue()
    child = fork.Process(target=_in_child, args=(model, x, answers))
    child.start()
    got = torch.tensor(answers.get(timeout=60))
    child.join(10)
    assert_close(got, expected)
