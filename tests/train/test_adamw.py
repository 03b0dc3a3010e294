"""The optimizer's sweep: the compiled one is its plain meaning bit for bit, and both are AdamW."""

import copy
import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from fewbits.kernels import adamw as kernels
from fewbits.train.adamw import Coefficients, Update, adamw, adamw_plain
from fewbits.train.gradients import gradient_stats_plain, read
from fewbits.train.storage import STATE_BLOCK, STATE_CODES, Storage, join, split

HYPER = {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.1}
MASTERS = ["fp32", "split", "kahan", "stochastic"]
STATES = ["fp32", "bf16", "8bit"]
GRADIENTS = [torch.float32, torch.bfloat16, torch.float16]


def storages(master: str, state: str) -> list[Storage]:
    """Parameters of awkward sizes: one element, partial blocks, more than a chunk."""
    torch.manual_seed(0)
    shapes = [(1,), (65, 64), (3, 1499), (70, 101)]
    return [Storage.of(i, nn.Parameter(torch.randn(shape)), master, state) for i, shape in enumerate(shapes)]


def gradients_of(stored: list[Storage], dtype: torch.dtype, step: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(step)

    def one(shape: torch.Size) -> Tensor:
        sizes = 10 ** torch.empty(shape).uniform_(-6, 2, generator=generator)  # over many orders of magnitude
        values = torch.randn(shape, generator=generator) * sizes
        return values.masked_fill(torch.rand(shape, generator=generator) < 0.1, 0).to(dtype)

    return [one(storage.param.shape) for storage in stored]


def updates_of(
    stored: list[Storage], gradients: list[Tensor], copies: list[Tensor | None], factor: float
) -> list[Update]:
    for storage in stored:
        storage.steps += 1
    return [
        Update(s, g, Coefficients.of(**HYPER, steps=s.steps, factor=factor), c)
        for s, g, c in zip(stored, gradients, copies, strict=True)
    ]


@pytest.mark.parametrize("dtype", GRADIENTS)
@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("master", MASTERS)
def test_the_sweep_is_its_plain_meaning_bit_for_bit(master: str, state: str, dtype: torch.dtype) -> None:
    swept = storages(master, state)
    plain = copy.deepcopy(swept)
    copied = torch.float16 if dtype == torch.float16 else torch.bfloat16
    for step in range(3):
        copies = [torch.empty_like(s.param, dtype=copied) if master == "fp32" else None for s in swept]
        expected = copy.deepcopy(copies)
        gradients = gradients_of(swept, dtype, step)
        adamw(updates_of(swept, gradients, copies, 0.25), seed=3)
        with torch.no_grad():
            for update in updates_of(plain, gradients, expected, 0.25):
                adamw_plain(update, 3)
        for ours, its, low, low_expected in zip(swept, plain, copies, expected, strict=True):
            assert torch.equal(ours.param, its.param)
            for name, tensor in its.tensors().items():
                assert torch.equal(ours.tensors()[name], tensor), name
            assert low is None or torch.equal(low, low_expected)


def test_it_is_the_adamw_of_pytorch() -> None:
    (storage,) = [s for s in storages("fp32", "fp32") if s.param.shape == (65, 64)]
    param = nn.Parameter(storage.param.detach().clone())
    optimizer = torch.optim.AdamW([param], **HYPER)
    for step in range(20):
        (gradient,) = gradients_of([storage], torch.float32, step)
        param.grad = gradient.clone()
        optimizer.step()
        adamw(updates_of([storage], [gradient * 8], [None], 0.125), seed=0)
    torch.testing.assert_close(storage.param, param, rtol=2e-6, atol=2e-7)


@pytest.mark.parametrize("master", ["split", "kahan", "stochastic"])
def test_other_masters_follow_the_float32_one(master: str) -> None:
    exact, other = storages("fp32", "fp32"), storages(master, "fp32")
    for step in range(60):
        gradients = gradients_of(exact, torch.float32, step)
        adamw(updates_of(exact, gradients, [None] * 4, 1.0), seed=0)
        adamw(updates_of(other, gradients, [None] * 4, 1.0), seed=0)
    for its, ours in zip(exact, other, strict=True):
        if master == "split":
            assert torch.equal(ours.master_value(), its.master_value())
        else:
            # Steps of 1e-3 on weights of 1: rounding to the nearest bf16, with 2^-9 between, would lose them all.
            assert (ours.master_value() - its.master_value()).abs().max() < 0.1
            drift = (ours.master_value() - its.master_value()).mean()
            assert drift.abs() < 1e-3


def test_weight_decay_too_small_for_bf16_is_not_lost_in_a_kahan_master() -> None:
    storage = Storage.of(0, nn.Parameter(torch.full((64, 64), 1.5)), "kahan", "fp32")
    zero = torch.zeros(64, 64)
    for _ in range(1000):
        storage.steps += 1
        c = Coefficients.of(1e-3, (0.9, 0.999), 1e-8, 0.1, storage.steps, 1.0)  # lr · decay is 1e-4, half an ulp 2^-9
        adamw([Update(storage, zero, c, None)], seed=0)
    assert storage.param[0, 0].item() == pytest.approx(1.5 * (1 - 1e-4) ** 1000, rel=2**-8)


@pytest.mark.parametrize("state", ["bf16", "8bit"])
def test_narrow_second_moments_do_not_stand_still(state: str) -> None:
    storage = Storage.of(0, nn.Parameter(torch.zeros(64, 256)), "fp32", state)
    generator = torch.Generator().manual_seed(0)
    for _ in range(3000):
        storage.steps += 1
        gradient = torch.randn(64, 256, generator=generator)
        adamw([Update(storage, gradient, Coefficients.of(**HYPER, steps=storage.steps, factor=1.0), None)], seed=0)
    # To nearest, bf16 would end at 0.25. Roots of 8 bits are right on average, so that their squares are a bit large.
    ratio = storage.moments()[1].mean().item() / (1 - 0.999**3000)
    assert 0.98 < ratio < (1.02 if state == "bf16" else 1.08)


def test_a_small_gradient_beside_a_large_one_takes_no_huge_step() -> None:
    storage = Storage.of(0, nn.Parameter(torch.zeros(64, 64)), "fp32", "8bit")
    gradient = torch.full((64, 64), 1e-7)
    gradient[:, 0] = 1e3
    for _ in range(20):
        storage.steps += 1
        adamw([Update(storage, gradient, Coefficients.of(**HYPER, steps=storage.steps, factor=1.0), None)], seed=0)
    assert storage.param.abs().max() < 20 * HYPER["lr"] * 1.5


@pytest.mark.parametrize(
    "word", [0, 1, 0x7FFF, 0x8000, 0x8001, 0x3F808000, 0x3F818000, 0x7F7FFFFF, 0x7F7F8000, 0x7F800000, 0x7FC00001]
)
@pytest.mark.parametrize("sign", [0, 1 << 31])
def test_split_and_join_give_every_bit_back(word: int, sign: int) -> None:
    bits = word | sign
    value = torch.tensor([bits - (1 << 32) if bits >> 31 else bits], dtype=torch.int32).view(torch.float32)
    assert torch.equal(join(*split(value)).view(torch.int32), value.view(torch.int32))


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(-(2**31), 2**31 - 1), min_size=1, max_size=64))
def test_split_and_join_give_any_word_back(words: list[int]) -> None:
    value = torch.tensor(words, dtype=torch.int32).view(torch.float32)
    assert torch.equal(join(*split(value)).view(torch.int32), value.view(torch.int32))


@pytest.mark.parametrize("dtype", GRADIENTS)
@pytest.mark.parametrize("count", [0, 1, 15, 16, 4096, 4097, 100_003])
def test_statistics_are_their_plain_meaning_bit_for_bit(count: int, dtype: torch.dtype) -> None:
    torch.manual_seed(count)
    x = (torch.randn(count) * 10 ** torch.empty(count).uniform_(-4, 4)).to(dtype)
    stats = kernels.gradient_stats([x, x[: count // 2]], STATE_CODES)
    if stats is None:
        pytest.skip("there are no kernels here")
    for row, part in zip(stats, (x, x[: count // 2]), strict=True):
        assert torch.equal(row, gradient_stats_plain(part))
        torch.testing.assert_close(row[3], part.double().square().sum())


def test_culprits_are_named_and_counted() -> None:
    good, bad = torch.ones(10, 10), torch.ones(5000)
    bad[7] = bad[4999] = float("inf")
    bad[123] = float("nan")
    reading = read({"good": good, "bad": bad})
    assert [dataclasses.astuple(culprit) for culprit in reading.culprits] == [("bad", 2, 1)]
    assert (reading.infinite, reading.nan, reading.amax) == (True, True, 1.0)
    assert read({"good": good}).norm == 10.0


def test_bytes_of_each_choice() -> None:
    sizes = {}
    for master in MASTERS:
        for state in STATES:
            param = nn.Parameter(torch.zeros(256, STATE_BLOCK))
            sizes[master, state] = Storage.of(0, param, master, state).nbytes() / param.numel()
    assert sizes["fp32", "fp32"] == 12
    assert sizes["split", "fp32"] == 12
    assert sizes["split", "bf16"] == sizes["kahan", "bf16"] == 8
    assert sizes["stochastic", "8bit"] == pytest.approx(4, abs=0.05)
