"""Histograms of exponents: every value is in the right bin, and a format's zones are read from the bins exactly."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import fewbits
from fewbits import Format
from fewbits.train.exponents import Counts, Histogram
from fewbits.train.preflight_prediction import Zones, fractions

FLOATS = st.floats(width=32, allow_nan=False)
NARROW = st.integers(-149, 127).map(lambda k: math.ldexp(1.0, k))  # powers of two: every threshold, and beyond


def histogram(*values: float) -> Histogram:
    found = Histogram()
    found.add(Counts.of(torch.tensor(values, dtype=torch.float32)))
    return found


@given(st.lists(FLOATS, min_size=1, max_size=50))
def test_each_value_is_counted_by_its_exponent(values: list[float]) -> None:
    found = histogram(*values)
    expected: dict[int, int] = {}
    for value in values:
        if value and math.isfinite(value):
            e = max(math.frexp(value)[1] - 1, -127)  # float32's subnormals are together
            expected[e] = expected.get(e, 0) + 1
    assert found.by_exponent() == expected
    assert found.values == len(values)
    assert found.zeros == values.count(0)
    assert found.infinite == sum(math.isinf(value) for value in values)
    assert found.counts.largest == max((abs(value) for value in values if math.isfinite(value)), default=0)


@pytest.mark.parametrize("values", [[], [math.nan], [math.nan, 3.0, -math.inf, 0.0, math.nan]])
def test_nan_inf_and_nothing(values: list[float]) -> None:
    found = histogram(*values)
    assert found.counts.nan == sum(value != value for value in values)
    assert (found.values, found.infinite) == (len(values), int(-math.inf in values))
    assert found.counts.largest == (3.0 if 3.0 in values else 0.0)


@given(st.lists(st.sampled_from([0.0, 1.0, 1.25, -3.7, 2.0**-20, 1e-4]), max_size=9), st.integers(-30, 30))
def test_a_scale_moves_the_counts_exactly(values: list[float], k: int) -> None:
    moved = Counts.of(torch.tensor(values)).scaled(k)
    direct = Counts.of(torch.tensor(values) * 2.0**k)
    assert torch.equal(moved.bins, direct.bins)
    assert moved.largest == direct.largest


def test_large_and_strided_tensors_are_counted_whole() -> None:
    x = torch.randn(701, 911, generator=torch.Generator().manual_seed(0))
    assert torch.equal(Counts.of(x.t()[::2]).bins, Counts.of(x.t()[::2].contiguous()).bins)
    assert histogram().values == 0
    assert int(Counts.of(x).bins.sum()) == x.numel()
    assert torch.equal(Counts.of(x.bfloat16()).bins, Counts.of(x.bfloat16().float()).bins)


@pytest.mark.parametrize("name", ["e4m3fn", "e5m2"])
@given(values=st.lists(st.one_of(NARROW, FLOATS.filter(math.isfinite)), min_size=1, max_size=60))
def test_what_8_bits_make_of_values_is_predicted_exactly_with_ties(name: str, values: list[float]) -> None:
    fmt = Format.named(name)
    x = torch.tensor(values, dtype=torch.float32)
    rounded = fewbits.round_to(x, fmt.name, overflow="saturate")
    told = fractions(histogram(*values), fmt, 1.0)
    n = len(values)
    assert round(told.zeroed * n) == int(((rounded == 0) & (x != 0)).sum())
    assert round(told.subnormal * n) == int(((rounded != 0) & (rounded.abs() < fmt.smallest_normal)).sum())
    assert round(told.saturated * n) == int((x.abs() > Zones.of(fmt).over_from).sum())


@pytest.mark.parametrize(("name", "dtype"), [("fp16", torch.float16), ("bf16", torch.bfloat16)])
def test_what_16_bits_make_of_values_is_predicted(name: str, dtype: torch.dtype) -> None:
    fmt = Format.named(name)
    exponents = torch.empty(200_000).uniform_(-30, 18, generator=torch.Generator().manual_seed(1))
    x, rounded = exponents.exp2(), exponents.exp2().to(dtype)
    told = fractions(histogram(*x.tolist()), fmt, 1.0)
    assert told.zeroed == pytest.approx(float((rounded == 0).float().mean()), rel=1e-6)
    assert told.subnormal == pytest.approx(
        float(((rounded > 0) & (rounded < fmt.smallest_normal)).float().mean()), rel=1e-3
    )
    assert told.saturated == pytest.approx(float(rounded.isinf().float().mean()), rel=1e-3)


@pytest.mark.parametrize("scale", [2.0**-10, 1.0, 2.0**13])
def test_a_loss_scale_multiplies_the_values(scale: float) -> None:
    x = torch.randn(50_000, generator=torch.Generator().manual_seed(2)) * 1e-6
    told = fractions(histogram(*x.tolist()), Format.named("fp16"), scale)
    rounded = (x * scale).half()
    assert told.zeroed == pytest.approx(float((rounded == 0).float().mean()), abs=1e-9)
    error = (rounded.float() - x * scale).abs()[rounded.abs() < 2.0**-14].sum() / (x * scale).abs().sum()
    assert told.lost == pytest.approx(float(error), rel=0.1)
