"""A decoder layer that reads int8 keys and values beside its modules on what they stand for.

``test_isa.py`` runs this file for every instruction set.
"""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from test_decoder_layer import EVERY, KINDS, assert_close, make, random
from torch import Tensor
from transformers import DynamicCache

from fewbits.kernels import native, reference
from fewbits.models.fused import fuse, unfuse
from fewbits.models.fused_layer import FusedLayer
from fewbits.models.int8_cache import Int8Layer, to_int8

pytestmark = pytest.mark.skipif(not native.status().loaded, reason="there are no compiled kernels")


@pytest.fixture(autouse=True)
def no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


class Both:
    """A model's layer through the kernel and through its modules, each with an int8 cache of its own."""

    def __init__(self, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
        self.model, self.runs = make(kind), 0
        self.caches = [DynamicCache(config=self.model.config) for _ in range(2)]
        for cache in self.caches:
            to_int8(cache)
        run = FusedLayer.run

        def counted(layer: FusedLayer, *args: Any) -> Tensor:
            self.runs += 1
            return run(layer, *args)

        monkeypatch.setattr(FusedLayer, "run", counted)

    def __call__(self, x: Tensor, **kwargs: Any) -> tuple[Tensor, Tensor]:
        results = []
        for change, cache in zip((fuse, unfuse), self.caches, strict=True):
            change(self.model)
            results.append(self.model(inputs_embeds=x, past_key_values=cache, **kwargs).last_hidden_state)
        return results[0], results[1]


@EVERY
@pytest.mark.parametrize("past", [1, 4, 64, 65, 300])
def test_tokens_after_a_prompt(kind: str, past: int, monkeypatch: pytest.MonkeyPatch) -> None:
    both = Both(kind, monkeypatch)
    for T in (past, 1, 1, 3, 1, 20, 1):
        assert_close(*both(random(2, T, both.model.config.hidden_size)))
    assert both.runs == 7
    ours, theirs = (cache.layers[0] for cache in both.caches)
    assert ours.get_seq_length() == theirs.get_seq_length() == past + 27
    assert isinstance(ours, Int8Layer)
    assert_close(ours.keys, theirs.keys)
    assert_close(ours.values, theirs.values)


@EVERY
def test_texts_padded_on_the_left(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    both, mask = Both(kind, monkeypatch), torch.ones(3, 40, dtype=torch.int64)
    mask[1, :9], mask[2, :39] = 0, 0
    for T in (40, 1, 2, 20):
        visible = torch.cat([mask, torch.ones(3, both.caches[0].get_seq_length() + T - 40, dtype=torch.int64)], 1)
        positions = (visible.cumsum(1) - 1).clamp_min(0)[:, -T:]
        x = random(3, T, both.model.config.hidden_size)
        got, expected = both(x, attention_mask=visible, position_ids=positions)
        real = visible[:, -T:].bool()
        assert_close(got[real], expected[real])
    assert both.runs == 4


@pytest.mark.parametrize("kind", ["llama", "odd"])
def test_the_kernel_writes_what_quantize_per_token_does(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    both, plain = Both(kind, monkeypatch), DynamicCache()
    x = random(2, 30, KINDS[kind][1].get("hidden_size", 64))
    both(x)
    fuse(both.model)
    both.model(inputs_embeds=x, past_key_values=plain)
    layer = both.caches[0].layers[0]
    for held, numbers in ((layer._keys, plain.layers[0].keys), (layer._values, plain.layers[0].values)):
        codes, scales = reference.quantize_per_token(numbers)
        assert torch.equal(held.buffer[:, :, : held.end], codes)
        assert torch.equal(held.scales[:, :, : held.end], scales[..., 0])


def test_a_bad_token_is_seen_by_later_ones_only(monkeypatch: pytest.MonkeyPatch) -> None:
    both = Both("llama", monkeypatch)
    x = random(2, 300, 64)
    x[0, 200, 3] = torch.inf
    got, _ = both(x)
    assert got[0, :200].isfinite().all()
    assert got[0, 200:].isnan().all()
    assert got[1].isfinite().all()
    after, _ = both(random(2, 1, 64))
    assert after[0].isnan().all()
    assert after[1].isfinite().all()
