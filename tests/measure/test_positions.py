import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fewbits.measure.positions import CHOICES, WORST, WorstPositions, standard_error

NAN = math.nan


def test_the_error_is_that_of_the_means_of_blocks_of_64() -> None:
    values = torch.randn(4, 512, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    means = values.view(32, 64).mean(1)
    assert standard_error(values) == pytest.approx(means.std().item() / math.sqrt(32), rel=1e-9)


def test_positions_that_are_alike_count_as_one() -> None:
    """Each value 64 times in a row: taken as independent, the error would look 8 times as small."""
    values = torch.randn(8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    repeated = values.repeat_interleave(64, 1)
    assert standard_error(repeated) == pytest.approx(values.std().item() / 8, rel=1e-9)


def test_a_short_text_is_cut_into_smaller_blocks_which_may_be_unequal() -> None:
    values = torch.arange(20, dtype=torch.float64).view(2, 10) ** 2
    blocks = [part for window in values - values.mean() for part in window.tensor_split(4)]
    assert [len(block) for block in blocks] == [3, 3, 2, 2] * 2
    expected = math.sqrt(sum(block.sum().item() ** 2 for block in blocks) * 8 / 7) / 20
    assert standard_error(values) == pytest.approx(expected, rel=1e-12)


def test_the_error_predicts_how_far_means_scatter() -> None:
    """Of 300 texts with positions that depend on each other (an autoregression), the error's own mean is near."""
    noise = torch.randn(300, 4, 512, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    values = noise.clone()
    for t in range(1, 512):
        values[:, :, t] += 0.8 * values[:, :, t - 1]
    scatter = values.mean((1, 2)).std().item()
    told = math.sqrt(sum(standard_error(each) ** 2 for each in values) / 300)
    naive = values.std().item() / math.sqrt(4 * 512)
    assert 0.85 * scatter < told < 1.15 * scatter  # scatter itself is known to 4 %
    assert naive < 0.5 * scatter


@pytest.mark.parametrize("values", [[[1.0]], [[1.0, NAN]]], ids=["one block", "NaN"])
def test_without_an_estimate_it_is_nan(values: list[list[float]]) -> None:
    assert math.isnan(standard_error(torch.tensor(values, dtype=torch.float64)))


@given(st.lists(st.floats(0, 100), min_size=40, max_size=40), st.integers(1, 20))
def test_the_worst_are_the_greatest_however_the_rows_come(kls: list[float], rows: int) -> None:
    kl = torch.tensor(kls, dtype=torch.float64).view(2, 20)
    log_p = torch.zeros(20, 5).log_softmax(-1)
    worst = WorstPositions()
    for window in (0, 1):
        for first in range(0, 20, rows):
            part = slice(first, first + rows)
            worst.see(window, first, kl[window, part], log_p[part], log_p[part])
    found = worst.found()
    assert [each.kl for each in found] == sorted(kls, reverse=True)[:WORST]
    assert all(kl[each.window, each.position].item() == each.kl for each in found)
    assert len({(each.window, each.position) for each in found}) == WORST


def test_the_likeliest_tokens_come_with_their_probabilities() -> None:
    worst = WorstPositions()
    log_p, log_q = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log(), torch.tensor([[0.1, 0.2, 0.3, 0.4]]).log()
    worst.see(3, 7, torch.tensor([0.25]), log_p, log_q)
    (found,) = worst.found()
    assert (found.window, found.position, len(found.reference)) == (3, 7, CHOICES)
    assert [token for token, _ in found.reference] == [0, 1, 2]
    assert [token for token, _ in found.candidate] == [3, 2, 1]
    assert [probability for _, probability in found.candidate] == pytest.approx([0.4, 0.3, 0.2])


def test_what_is_not_finite_is_not_among_the_worst() -> None:
    worst = WorstPositions()
    log_p = torch.zeros(3, 2)
    worst.see(0, 0, torch.tensor([NAN, 1.0, math.inf]), log_p, log_p)
    assert [(each.position, each.kl) for each in worst.found()] == [(1, 1.0)]
