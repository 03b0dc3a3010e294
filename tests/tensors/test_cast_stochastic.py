"""Stochastic rounding: reproducible, unbiased, and never moving what the format holds."""

import pytest
import torch

import fewbits
from fewbits.tensors.random import random_words


def test_the_bits_are_fixed_for_ever():
    # A change of the generator would change every stochastic result; it needs a major version.
    assert random_words(0, torch.arange(3)).tolist() == [795451481, 2047840078, 567031172]


def test_the_same_seed_gives_the_same_bits_for_any_thread_count():
    x = torch.randn(200_000)
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2):
            torch.set_num_threads(count)
            results.append(fewbits.round_to(x, "e4m3fn", "stochastic", seed=3))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(*results)
    assert not torch.equal(results[0], fewbits.round_to(x, "e4m3fn", "stochastic", seed=4))


def test_an_element_depends_on_its_position_alone():
    x = torch.full((100_000,), 1.05)
    whole = fewbits.round_to(x, "e4m3fn", "stochastic", seed=9)
    assert torch.equal(whole[:1000], fewbits.round_to(x[:1000], "e4m3fn", "stochastic", seed=9))
    assert torch.equal(whole.reshape(1000, 100), fewbits.round_to(x.reshape(1000, 100), "e4m3fn", "stochastic", seed=9))


UNBIASED = [(n, v) for n in ("e4m3fn", "e2m1fn", "bf16", "int8", "nf4") for v in (0.3, -0.7, 0.01, 0.9)]


@pytest.mark.parametrize(("name", "value"), [*UNBIASED, ("e8m0fnu", 0.3), ("mxfp4", 0.3)])
def test_unbiased(name, value):
    n = 1 << 18
    rounded = fewbits.round_to(torch.full((n,), value, dtype=torch.float64), name, "stochastic", seed=1)
    gap = float(rounded.max() - rounded.min())
    assert gap > 0
    assert abs(float(rounded.mean()) - value) < 5 * gap / 2 / n**0.5  # five standard deviations


def test_unbiased_where_many_bits_are_dropped():
    tiny = 2.0**-9 * 2.0**-12  # 1/4096 of e4m3fn's smallest value
    n = 1 << 20
    ups = (fewbits.encode(torch.full((n,), tiny), "e4m3fn", "stochastic", seed=2) == 1).sum().item()
    assert abs(ups - n / 4096) < 5 * (n / 4096) ** 0.5


def test_random_words_look_uniform_and_seeds_unrelated():
    n = 1 << 16
    positions = torch.arange(n)
    words = random_words(123, positions)
    for bit in range(32):
        assert abs(((words >> bit) & 1).sum().item() - n / 2) < 5 * n**0.5 / 2
    for other in (random_words(124, positions), random_words(123, positions + 1), random_words(123, positions + 2**32)):
        agree = sum(((words ^ other) >> bit & 1 == 0).sum().item() for bit in range(32))
        assert abs(agree - 16 * n) < 5 * (32 * n) ** 0.5 / 2
    assert len(words.unique()) > n - 3  # two random 32-bit words in 65,536 collide about half of the time


@pytest.mark.parametrize("name", ["e4m3fn", "mxfp4", "nf4"])
def test_what_the_format_holds_stays(name):
    x = fewbits.round_to(torch.randn(4, 64, dtype=torch.float64), name)
    assert torch.equal(fewbits.round_to(x, name, "stochastic", seed=8), x)


def test_inf_and_nan_are_not_disturbed():
    x = torch.tensor([float("inf"), float("-inf"), float("nan")]).repeat(1000)
    assert torch.equal(fewbits.round_to(x, "e5m2", "stochastic", seed=0).nan_to_num(7.0), x.nan_to_num(7.0))
