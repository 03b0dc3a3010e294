"""The loss scale: what it does after Inf, NaN and clean steps, for any sequence of them."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fewbits.train.loss_scale import LossScale
from fewbits.train.recipe import LossScaling

LARGEST = 65504.0


def fresh(**rules: object) -> LossScale:
    return LossScale(LossScaling(**rules), LARGEST)


def run(scale: LossScale, limit: float, gradient: float, steps: int) -> int:
    """Steps of a model that overflows above a scale; how many were skipped."""
    skipped = 0
    for _ in range(steps):
        over = scale.scale > limit
        skipped += over
        scale.update(gradient * scale.scale, over, over)
    return skipped


def test_without_rules_the_scale_is_one_and_stays() -> None:
    scale = LossScale(None, LARGEST)
    scale.update(1.0, infinite=True, nan=False)
    assert scale.scale == 1.0


def test_a_fixed_scale_stays() -> None:
    scale = fresh(initial=2.0**10, dynamic=False)
    scale.update(1.0, infinite=True, nan=False)
    run(scale, math.inf, 1e-6, 100)
    assert scale.scale == 2.0**10


def test_an_overflow_halves_and_more_in_a_row_lower_it_faster() -> None:
    scale = fresh()
    seen = []
    for _ in range(6):
        scale.update(1.0, infinite=True, nan=True)
        seen.append(math.log2(scale.scale))
    assert seen == [15, 13, 10, 6, 1, 0]


def test_two_hundred_overflows_are_forgotten_in_tens_of_clean_steps() -> None:
    scale = fresh()
    assert run(scale, 0.0, 1e-4, 200) == 200
    assert scale.scale == 1.0
    steps = 0
    while scale.scale < 2.0**16:
        scale.update(1e-4 * scale.scale, infinite=False, nan=False)
        steps += 1
    assert steps <= 64


def test_the_scale_is_solved_from_the_gradients() -> None:
    scale = fresh()
    run(scale, math.inf, 1e-7, 100)
    assert scale.scale == scale.rules.cap  # 1e-7 · 2^24 is far below 65504 / 8
    run(scale, math.inf, 1.0, 8)
    assert scale.scale == 2.0**12  # 8188 is the room


def test_a_scale_that_overflowed_after_growing_is_left_alone() -> None:
    scale = fresh()
    run(scale, 2.0**10, 1e-6, 60)
    assert scale.scale == 2.0**10
    assert run(scale, 2.0**10, 1e-6, 400) == 0
    assert run(scale, 2.0**10, 1e-6, 2000) <= 2 * 2000 // scale.rules.memory


def test_nan_alone_keeps_the_scale_once_and_a_run_of_it_counts_as_overflow() -> None:
    scale = fresh()
    scale.update(1.0, infinite=False, nan=True)
    assert scale.scale == 2.0**16
    scale.update(1.0, infinite=False, nan=False)
    scale.update(1.0, infinite=False, nan=True)
    assert scale.scale == 2.0**16
    scale.update(1.0, infinite=False, nan=True)
    assert scale.scale < 2.0**16


def test_hysteresis_lets_single_overflows_pass() -> None:
    scale = fresh(hysteresis=2)
    scale.update(1.0, infinite=True, nan=False)
    assert scale.scale == 2.0**16
    scale.update(1.0, infinite=True, nan=False)
    assert scale.scale == 2.0**15


steps = st.lists(st.tuples(st.floats(0, LARGEST), st.booleans(), st.booleans()), max_size=300)


@settings(max_examples=60, deadline=None)
@given(steps, st.integers(-10, 10), st.integers(0, 20), st.integers(1, 4), st.integers(1, 50))
def test_any_sequence_keeps_the_scale_a_power_of_two_in_range(
    steps: list[tuple[float, bool, bool]], floor: int, above: int, hysteresis: int, patience: int
) -> None:
    rules = LossScaling(
        initial=2.0**floor, floor=2.0**floor, cap=2.0 ** (floor + above), hysteresis=hysteresis, patience=patience
    )
    scale = LossScale(rules, LARGEST)
    for amax, infinite, nan in steps:
        before = scale.scale
        scale.update(amax, infinite, nan)
        assert rules.floor <= scale.scale <= rules.cap
        assert math.frexp(scale.scale)[0] == 0.5
        assert 0 < 1 / scale.scale < math.inf
        if infinite:
            assert scale.scale <= before


@settings(max_examples=40, deadline=None)
@given(steps, steps)
def test_a_saved_scale_goes_on_as_if_never_saved(
    before: list[tuple[float, bool, bool]], after: list[tuple[float, bool, bool]]
) -> None:
    scale, resumed = fresh(), fresh()
    for step in before:
        scale.update(*step)
    resumed.load_state_dict(scale.state_dict())
    for step in after:
        scale.update(*step)
        resumed.update(*step)
    assert resumed == scale


@pytest.mark.parametrize("limit", [2.0**4, 2.0**12, 2.0**20])
def test_few_steps_are_skipped_in_a_long_run(limit: float) -> None:
    assert run(fresh(), limit, 1e-6, 3000) <= 20
