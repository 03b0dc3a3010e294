"""The cache that grows in place does what transformers' own does, whatever is done to it."""

import copy
import pickle
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import DynamicCache, StaticCache
from transformers.cache_utils import Cache, DynamicLayer, DynamicSlidingWindowLayer

from fewbits.models.kv_cache import GrowingLayer, GrowingSlidingLayer, growing_layer

WINDOWS = pytest.mark.parametrize("window", [None, 4])
STEP = st.one_of(
    st.tuples(st.just("update"), st.integers(1, 7)),
    st.tuples(st.just("crop"), st.integers(-2, 0)),
    st.tuples(st.just("reorder"), st.permutations([0, 1])),
    st.tuples(st.just("repeat"), st.integers(1, 2)),
    st.tuples(st.just("select"), st.lists(st.integers(0, 1), min_size=2, max_size=2)),
    st.tuples(st.just("reset"), st.none()),
    st.tuples(st.just("record"), st.none()),
    st.tuples(st.just("copy"), st.none()),
)


def theirs(window: int | None) -> Any:
    return DynamicLayer() if window is None else DynamicSlidingWindowLayer(sliding_window=window)


def ours(window: int | None) -> Any:
    layer = growing_layer(Cache(layers=[theirs(window)]), 0)
    assert layer is not None
    return layer


def states(B: int, T: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(B, 2, T, 6, generator=generator), torch.randn(B, 2, T, 6, generator=generator)


def same(a: Tensor | None, b: Tensor | None) -> bool:
    return a is b is None or (a is not None and b is not None and torch.equal(a, b))


def do(layer: Any, what: str, how: Any, seed: int) -> Any:
    if what == "update":
        B = layer.keys.shape[0] if layer.is_initialized and layer.keys.ndim == 4 else 2
        return layer.update(*states(B, how, seed))
    if what == "crop":
        recorded = getattr(layer, "record_past", True)
        return layer.crop(how) if recorded and layer.get_seq_length() > 2 else None
    if what == "record":
        return layer.activate_past_recording() if layer.is_sliding else None
    acts = {"repeat": layer.batch_repeat_interleave, "reset": lambda _: layer.reset(), "copy": lambda _: None}
    many = {"reorder": layer.reorder_cache, "select": layer.batch_select_indices}
    return many[what](torch.tensor(how)) if what in many else acts[what](how)


@WINDOWS
@settings(deadline=None, max_examples=150)
@given(steps=st.lists(STEP, max_size=12))
def test_any_sequence_of_steps(window: int | None, steps: list[tuple[str, Any]]) -> None:
    one, other = theirs(window), ours(window)
    for seed, (what, how) in enumerate(steps):
        if what == "repeat" and one.is_initialized and one.keys.ndim == 4 and one.keys.shape[0] > 2:
            continue
        expected, got = do(one, what, how, seed), do(other, what, how, seed)
        if what == "copy":
            other = copy.deepcopy(other)
        if what == "update":
            assert all(map(torch.equal, got, expected))
        assert other.get_seq_length() == one.get_seq_length()
        assert other.is_initialized == one.is_initialized
        assert other.get_mask_sizes(3) == one.get_mask_sizes(3)
        assert same(other.keys, one.keys)
        assert same(other.values, one.values)


@WINDOWS
def test_a_token_is_written_where_there_is_room(window: int | None) -> None:
    layer = ours(window)
    layer.update(*states(1, 100))
    addresses = set()
    for _ in range(1000):
        keys, _ = layer.update(*states(1, 1))
        addresses.add(keys.untyped_storage().data_ptr())
    assert len(addresses) < 10


def test_what_was_given_out_stays() -> None:
    layer = ours(None)
    keys, values = layer.update(*states(1, 5))
    before = keys.clone(), values.clone()
    for seed in range(400):
        layer.update(*states(1, 1, seed))
    assert torch.equal(keys, before[0])
    assert torch.equal(values, before[1])


def test_tensors_from_elsewhere_are_not_written_behind() -> None:
    layer, (keys, values) = ours(None), states(1, 9)
    layer.update(*states(1, 1))
    layer.keys, layer.values = keys[:, :, :4], values[:, :, :4]
    before = keys.clone()
    layer.update(*states(1, 2, 1))
    assert torch.equal(keys, before)
    assert layer.get_seq_length() == 6


def test_gradients_pass() -> None:
    layer = ours(None)
    keys, values = (each.requires_grad_() for each in states(1, 3))
    layer.update(keys, values)
    seen, _ = layer.update(*states(1, 1, 1))
    seen.sum().backward()
    assert torch.equal(keys.grad, torch.ones_like(keys))


@WINDOWS
def test_it_is_pickled(window: int | None) -> None:
    layer = ours(window)
    layer.update(*states(2, 6))
    again = pickle.loads(pickle.dumps(layer))
    assert torch.equal(again.keys, layer.keys)
    assert all(map(torch.equal, again.update(*states(2, 1, 1)), layer.update(*states(2, 1, 1))))


def test_a_positive_crop_is_refused_as_before() -> None:
    layer = ours(None)
    layer.update(*states(1, 6))
    with pytest.raises(ValueError, match="Please use a negative integer"):
        layer.crop(2)


def test_which_layers_are_taken_over() -> None:
    cache = DynamicCache()
    assert growing_layer(None, 0) is None
    assert isinstance(growing_layer(cache, 2), GrowingLayer)
    assert [type(layer) for layer in cache.layers] == [DynamicLayer, DynamicLayer, GrowingLayer]
    sliding = DynamicSlidingWindowLayer(sliding_window=4)
    assert isinstance(growing_layer(Cache(layers=[sliding]), 0), GrowingSlidingLayer)
    sliding.activate_past_recording()
    assert growing_layer(Cache(layers=[sliding]), 0) is None
    from transformers import LlamaConfig

    static = StaticCache(config=LlamaConfig(num_hidden_layers=1), max_cache_len=8)
    assert growing_layer(static, 0) is None


def test_tokens_of_before_are_kept() -> None:
    cache = DynamicCache()
    cache.update(*states(1, 5), 0)
    expected = cache.layers[0].keys
    layer = growing_layer(cache, 0)
    assert layer is not None
    assert torch.equal(layer.keys, expected)
