"""Cross entropy by rows is PyTorch's of the same logits in float32; transformers' causal models take it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional

from fewbits import MixedPrecision
from fewbits.train import causal_loss
from fewbits.train.cross_entropy import cross_entropy, takes


def both(x: Tensor, target: Tensor, **options: Any) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Ours and PyTorch's, in float32: the loss, and the gradient of three times its sum."""
    found = []
    for function in (cross_entropy, lambda wide, *rest, **more: functional.cross_entropy(wide.float(), *rest, **more)):
        leaf = x.clone().requires_grad_()
        loss = function(leaf, target, **options)
        (loss.sum() * 3).backward()
        assert leaf.grad is not None
        found.append((loss.detach(), leaf.grad))
    return found[0], found[1]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@settings(deadline=None)
@given(
    seed=st.integers(0, 1 << 30), rows=st.integers(1, 40), entries=st.integers(1, 300_000), spread=st.floats(0, 100),
    ignored=st.booleans(),
)  # fmt: skip
def test_it_is_that_of_float32(
    dtype: torch.dtype, reduction: str, seed: int, rows: int, entries: int, spread: float, ignored: bool
) -> None:
    rows = min(rows, 1 + 2_000_000 // entries)
    generator = torch.Generator().manual_seed(seed)
    x = (torch.randn(rows, entries, generator=generator) * spread).to(dtype)
    target = torch.randint(0, entries, (rows,), generator=generator)
    if ignored and rows > 1:
        target[::2] = -100
    (ours, gradient), (theirs, wanted) = both(x, target, reduction=reduction)
    assert ours.dtype == torch.float32
    assert gradient.dtype == dtype
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    # One rounding to 16 bits of numbers that float32 has up to a few ulps of the logits, in the exponent of exp.
    atol = 3 * 4 * 2.0**-24 * max(1.0, float(x.abs().max()))
    torch.testing.assert_close(gradient.float(), wanted.float(), rtol=2 * torch.finfo(dtype).eps, atol=atol)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_stays_visible(bad: float) -> None:
    x = torch.zeros(3, 5, dtype=torch.float16)
    x[1, 2] = bad
    (loss, gradient), (theirs, _) = both(x, torch.tensor([0, 1, 2]))
    assert not bool(loss.isfinite())
    assert not bool(theirs.isfinite())
    assert bool(gradient[1].isnan().any())
    assert bool(gradient[[0, 2]].isfinite().all())


def test_a_word_that_is_masked_has_no_gradient() -> None:
    x = torch.zeros(2, 5, dtype=torch.bfloat16)
    x[:, 3] = -math.inf
    (loss, gradient), (theirs, wanted) = both(x, torch.tensor([0, 4]))
    torch.testing.assert_close(loss, theirs)
    assert torch.equal(gradient, wanted)
    assert torch.equal(gradient[:, 3], torch.zeros(2, dtype=torch.bfloat16))


def test_no_row_that_counts() -> None:
    (loss, gradient), (theirs, _) = both(torch.zeros(2, 5, dtype=torch.bfloat16), torch.tensor([-100, -100]))
    assert bool(loss.isnan())
    assert bool(theirs.isnan())
    assert gradient.shape == (2, 5)


def test_what_it_does_not_take_is_left_to_pytorch() -> None:
    x, target = torch.zeros(2, 5, dtype=torch.bfloat16), torch.tensor([0, 4])
    assert takes(x, target, {"weight": None, "label_smoothing": 0.0, "ignore_index": -100, "reduction": "sum"})
    assert takes(x, torch.tensor([0, 7]), {"ignore_index": 7})
    for others in (
        (x.float(), target, {}), (x, target, {"label_smoothing": 0.1}), (x, target, {"weight": torch.ones(5)}),
        (x, x, {}), (x, torch.tensor([0, 5]), {}), (x[0], target[0], {}), (x, target, {"reduction": "other"}),
        (x[:0], target[:0], {}),
    ):  # fmt: skip
        assert not takes(*others)
    model = nn.Linear(3, 5)
    mp = MixedPrecision(model, torch.optim.AdamW(model.parameters()), "bf16")
    with mp.forward(), pytest.raises(IndexError, match="out of bounds"):
        functional.cross_entropy(model(torch.ones(2, 3)), torch.tensor([0, 5]))


def causal(**options: Any) -> transformers.PreTrainedModel:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=61, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, **options
    )
    return transformers.LlamaForCausalLM(config)


@contextmanager
def left_to_transformers(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with monkeypatch.context() as patched:
        patched.setattr("fewbits.train.policy.causal_models", lambda model: [])
        yield


@pytest.mark.parametrize(
    "more", [{}, {"num_items_in_batch": 7}, {"num_items_in_batch": torch.tensor(7)}, {"shift": True}]
)
def test_models_of_transformers_have_the_loss_that_they_had(
    more: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = torch.arange(20).view(2, 10) % 61
    labels = ids.clone()
    labels[0, :3] = -100
    batch = dict(more)
    if batch.pop("shift", False):
        batch["shift_labels"] = functional.pad(labels, (0, 1), value=-100)[..., 1:].contiguous()

    def run() -> tuple[float, Tensor]:
        model = causal()
        mp = MixedPrecision(model, torch.optim.SGD(model.parameters(), lr=0.0), "bf16")
        with mp.forward():
            loss = model(input_ids=ids, labels=labels, use_cache=False, **batch).loss
        mp.backward(loss)
        assert model.lm_head.weight.grad is not None
        return float(loss.detach()), model.lm_head.weight.grad.float()

    seen = []
    monkeypatch.setattr(causal_loss, "causal_loss", lambda *args, **rest: seen.append(1) or real(*args, **rest))
    ours = run()
    assert seen
    with left_to_transformers(monkeypatch):
        theirs = run()
    assert len(seen) == 1
    assert ours[0] == pytest.approx(theirs[0], rel=1e-6)
    torch.testing.assert_close(ours[1], theirs[1], rtol=2**-7, atol=1e-6)


real = causal_loss.causal_loss


def test_a_loss_of_the_users_own_stays_and_the_model_is_as_it_was() -> None:
    model, called = causal(), []

    def own(logits: Tensor, labels: Tensor, vocab_size: int, **_: Any) -> Tensor:
        called.append(vocab_size)
        return logits.float().mean()

    model.loss_function = own
    mp = MixedPrecision(model, torch.optim.SGD(model.parameters()), "bf16")
    ids = torch.arange(8).view(1, 8)
    with mp.forward():
        model(input_ids=ids, labels=ids)
    assert called == [61]
    assert model.loss_function is own

    plain = causal()
    before = plain.loss_function
    mp = MixedPrecision(plain, torch.optim.SGD(plain.parameters()), "fp16")
    with mp.forward():
        assert plain.loss_function is causal_loss.causal_loss
    assert plain.loss_function is before
