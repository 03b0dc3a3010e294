"""Reports of casts: what was counted, held against exact arithmetic value by value."""

import math
from fractions import Fraction

import pytest
import torch
from casting import adversarial, bits_of
from hypothesis import given
from hypothesis import strategies as st

import fewbits
from fewbits.formats import Format, exact
from fewbits.tensors.cast_report import CastReport, cast_and_report

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def judged_report(x, to):
    """The report that exact arithmetic gives, one value at a time."""
    fmt, smallest_before = Format.named(to), torch.finfo(x.dtype).smallest_normal
    overflowed = subnormal = zeroed = 0
    errors, relative = [Fraction(0)], [Fraction(0)]
    for value in x.double().flatten().tolist():
        if not math.isfinite(value):
            continue
        became = exact.decode(exact.encode(value, fmt), fmt)
        if became in (math.inf, -math.inf):
            overflowed += 1
            continue
        zeroed += value != 0 and became == 0
        subnormal += 0 < abs(became) < fmt.smallest_normal and abs(value) >= smallest_before
        errors.append(abs(Fraction(became) - Fraction(value)))
        relative += [errors[-1] / abs(Fraction(value))] if value else []
    return CastReport("w", x.numel(), overflowed, subnormal, zeroed, float(max(errors)), float(max(relative)))


def same(ours, judge):
    assert (ours.tensor, ours.values) == (judge.tensor, judge.values)
    assert (ours.overflowed, ours.subnormal, ours.zeroed) == (judge.overflowed, judge.subnormal, judge.zeroed)
    assert ours.max_abs_error == judge.max_abs_error  # exact
    assert ours.max_rel_error == pytest.approx(judge.max_rel_error, rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("to", DTYPES)
def test_counts_and_errors_are_exact(to, dtype):
    x = adversarial(to, dtype)
    cast, report = cast_and_report("w", x, to)
    same(report, judged_report(x, to))
    assert cast.dtype == DTYPES[to]
    assert torch.equal(bits_of(cast), bits_of(fewbits.round_to(x.double(), to).to(DTYPES[to])))


@pytest.mark.parametrize("to", ["fp16", "bf16"])
@given(st.lists(st.floats(width=32), min_size=1, max_size=20))
def test_any_float32(to, values):
    x = torch.tensor(values)
    same(cast_and_report("w", x, to)[1], judged_report(x, to))


@pytest.mark.parametrize(
    ("value", "counted"),
    [
        (65519.99, ""),
        (65520.0, "overflowed"),
        (-1e30, "overflowed"),
        (math.inf, ""),
        (math.nan, ""),
        (2.0**-14 - 2.0**-25, ""),  # the tie between the largest subnormal and the smallest normal number
        (2.0**-14 - 2.0**-25 - 2.0**-38, "subnormal"),
        (-(2.0**-24), "subnormal"),
        (2.0**-25 * 1.001, "subnormal"),
        (2.0**-25, "zeroed"),
        (-1e-40, "zeroed"),
        (-0.0, ""),
    ],
)
def test_each_kind_of_fate(value, counted):
    report = cast_and_report("w", torch.tensor([1.0, value]), "fp16")[1]
    assert {kind for kind in ("overflowed", "subnormal", "zeroed") if getattr(report, kind)} == {counted} - {""}
    assert getattr(report, counted or "values") == (1 if counted else 2)


def test_float64_is_rounded_once():
    x = torch.tensor([1 + 2.0**-11 + 2.0**-40], dtype=torch.float64)  # torch 2.13 rounds to float32 on the way: a tie
    assert x.to(torch.float16).item() == 1.0
    assert cast_and_report("w", x, "fp16")[0].item() == 1 + 2.0**-10


def test_saturation_counts_the_same():
    x = torch.tensor([1.0, 1e5, -7e4, math.inf, math.nan])
    cast, report = cast_and_report("w", x, "fp16", "saturate")
    assert cast[:4].tolist() == [1.0, 65504.0, -65504.0, 65504.0]
    assert cast[4].isnan()
    assert report == CastReport("w", 5, overflowed=2)


def test_relative_error_of_what_became_zero_is_one():
    report = cast_and_report("w", torch.tensor([0.0, 1e-12]), "fp16")[1]
    assert report.max_rel_error == 1.0
    assert report.max_abs_error == torch.tensor(1e-12).item()


@pytest.mark.parametrize(
    ("dtype", "to"),
    [(torch.bfloat16, "fp32"), (torch.float16, "fp32"), (torch.float8_e5m2, "fp32"), (torch.bfloat16, "bf16")],
)
def test_exact_casts_have_nothing_to_report(dtype, to):
    x = torch.tensor([1.5, -0.0, 2.0**-14, math.nan, math.inf]).to(dtype)
    cast, report = cast_and_report("w", x, to)
    assert report == CastReport("w", 5)
    assert torch.equal(bits_of(cast), bits_of(x.to(DTYPES[to])))


def test_a_subnormal_that_stays_one_has_not_become_one():
    x = torch.tensor([2.0**-127, 2.0**-130])  # subnormal in fp32 and in bf16
    assert cast_and_report("w", x, "bf16")[1] == CastReport("w", 2)
    assert cast_and_report("w", x.double(), "bf16")[1] == CastReport("w", 2, subnormal=2)


def test_chunks_add_up():
    x = torch.zeros(3 * (1 << 16) + 5)
    x[0], x[1 << 16], x[-1], x[-2] = 1e5, 1e-6, 1e-9, 1 + 2.0**-12
    assert cast_and_report("w", x, "fp16")[1] == CastReport("w", len(x), 1, 1, 1, 2.0**-12, 1.0)


def test_integers_and_fp8_are_cast_by_value():
    cast, report = cast_and_report("w", torch.tensor([3, 2049, 70000]), "fp16")
    assert cast.tolist() == [3.0, 2048.0, math.inf]
    assert (report.overflowed, report.max_abs_error) == (1, 1.0)
    x = torch.tensor([448.0, 2.0**-9]).to(torch.float8_e4m3fn)
    assert cast_and_report("w", x, "bf16")[1] == CastReport("w", 2)


def test_any_shape():
    for shape in [(), (0,), (2, 3), (0, 4)]:
        cast, report = cast_and_report("w", torch.full(shape, 1e6), "fp16")
        assert cast.shape == shape
        assert report.overflowed == report.values == cast.numel()
    strided = torch.full((4, 6), 1e-9)[:, ::2]
    assert cast_and_report("w", strided, "fp16")[1].zeroed == 12


def test_the_tensor_is_left_as_it_was():
    x = torch.tensor([1.1, -1e-9, 1e9], dtype=torch.float64)
    cast_and_report("w", x, "fp16")
    assert x.tolist() == [1.1, -1e-9, 1e9]


@pytest.mark.parametrize(
    ("to", "overflow", "message"),
    [
        ("e4m3fn", None, "a cast to e4m3fn is not reported: choose fp32, fp16, bf16"),
        ("fp99", None, "unknown format 'fp99'"),
        ("fp16", "wrap", "'wrap'"),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_what_is_refused(to, overflow, message, dtype):
    with pytest.raises(fewbits.FewbitsError, match=message):
        cast_and_report("w", torch.ones(1, dtype=dtype), to, overflow)
