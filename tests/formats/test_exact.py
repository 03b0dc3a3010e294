import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fewbits import FewbitsError
from fewbits.formats import Format, Rounding, exact

TORCH = {
    "fp16": (torch.float16, torch.int16),
    "bf16": (torch.bfloat16, torch.int16),
    "e4m3fn": (torch.float8_e4m3fn, torch.uint8),
    "e5m2": (torch.float8_e5m2, torch.uint8),
    "int8": (torch.int8, torch.uint8),
}
FLOATS = ("fp32", "tf32", "fp16", "bf16", "e4m3fn", "e5m2")


def same(a, b):
    """Equal as numbers, NaN to NaN, and -0 only to -0."""
    a, b = float(a), float(b)
    return (math.isnan(a) and math.isnan(b)) or (a == b and math.copysign(1, a) == math.copysign(1, b))


@pytest.mark.parametrize("name", TORCH)
def test_every_code_decodes_as_torch_reads_it(name):
    fmt = Format.named(name)
    dtype, container = TORCH[name]
    theirs = torch.arange(2**fmt.bits, dtype=torch.int32).to(container).view(dtype).double().tolist()
    assert all(same(exact.decode(code, fmt), value) for code, value in enumerate(theirs))


@pytest.mark.parametrize("name", ["fp16", "e4m3fn", "e5m2", "int8"])
@pytest.mark.parametrize("rounding", [r for r in Rounding if r is not Rounding.STOCHASTIC])
def test_every_code_survives_every_rounding(name, rounding):
    fmt = Format.named(name)
    for code in range(0, 2**fmt.bits, 1 if fmt.bits <= 8 else 97):
        value = exact.decode(code, fmt)
        again = exact.encode(value, fmt, rounding)
        assert again == (fmt.nan_code if value != value else code)


@given(st.floats(width=32), st.sampled_from(["fp16", "bf16", "e5m2"]))
def test_nearest_even_equals_torch(x, name):
    fmt, dtype = Format.named(name), TORCH[name][0]
    theirs = torch.tensor(x, dtype=torch.float32).to(dtype).item()
    assert same(exact.decode(exact.encode(x, fmt), fmt), theirs)


@given(st.fractions(), st.sampled_from(FLOATS), st.sampled_from(["saturate", "ieee"]))
def test_directed_roundings_bracket_the_number(x, name, overflow):
    fmt = Format.named(name)
    down, up = (exact.decode(exact.encode(x, fmt, r, "saturate"), fmt) for r in ("down", "up"))
    assert down <= x <= up or abs(x) > fmt.max
    nearest = exact.decode(exact.encode(x, fmt, "nearest_even", overflow), fmt)
    assert nearest in (down, up) or abs(x) > fmt.max
    zero = exact.decode(exact.encode(x, fmt, "toward_zero", overflow), fmt)
    assert abs(zero) <= abs(x)


@given(st.fractions(min_value=-500, max_value=500), st.integers(0, 2**32 - 1))
def test_stochastic_takes_one_of_the_two_neighbours(x, random):
    fmt = Format.named("e5m2")
    got = exact.decode(exact.encode(x, fmt, "stochastic", random=random), fmt)
    assert got in [exact.decode(exact.encode(x, fmt, r), fmt) for r in ("down", "up")]


def test_stochastic_probability_is_the_fraction_of_the_way():
    fmt, x = Format.named("e4m3fn"), Fraction(1) + Fraction(1, 8) * Fraction(1, 4)  # a quarter of the way to 1.125
    up = exact.encode(Fraction(9, 8), fmt)
    threshold = 3 << 30  # the lowest quarter of the random integers that carries
    assert exact.encode(x, fmt, "stochastic", random=threshold) == up
    assert exact.encode(x, fmt, "stochastic", random=threshold - 1) == up - 1


@pytest.mark.parametrize(
    ("value", "rounding", "overflow", "code"),
    [
        (464, "nearest_even", None, 0x7E),  # a tie with 480, which would be NaN's code: 448 is even
        (465, "nearest_even", "ieee", 0x7F),
        (465, "nearest_even", None, 0x7E),
        (464, "nearest_away", "ieee", 0x7F),
        (1e9, "toward_zero", "ieee", 0x7E),
        (-1e9, "up", "ieee", 0xFE),
        (449, "up", "ieee", 0x7F),
        (math.inf, "nearest_even", None, 0x7E),
        (-math.inf, "toward_zero", "ieee", 0x7F),
        (math.nan, "nearest_even", None, 0x7F),
        (-0.0, "nearest_even", None, 0x80),
        (Fraction(-1, 10**9), "nearest_even", None, 0x80),
        (Fraction(1, 1024), "nearest_even", None, 0x00),  # half of the smallest subnormal: a tie with 0, even
        (Fraction(1, 1024) + Fraction(1, 10**30), "nearest_even", None, 0x01),
    ],
)
def test_the_edges_of_e4m3fn(value, rounding, overflow, code):
    assert exact.encode(value, Format.named("e4m3fn"), rounding, overflow) == code


@pytest.mark.parametrize(
    ("value", "code"), [(127.5, 0x7F), (-128.5, 0x80), (-129, 0x80), (0.5, 0), (1.5, 2), (-1.5, 0xFE), (math.nan, 0)]
)
def test_int8_rounds_to_even_and_saturates(value, code):
    assert exact.encode(value, Format.named("int8")) == code


@given(st.floats(allow_nan=False, allow_infinity=False), st.sampled_from(FLOATS))
def test_neighbours_are_adjacent_and_strict(x, name):
    fmt = Format.named(name)
    below, above = exact.neighbours(Fraction(x), fmt)
    assert below is None or below < x
    assert above is None or above > x
    if below is not None and above is not None and abs(x) < fmt.max:
        between = [v for v in (exact.decode(exact.encode(x, fmt), fmt),) if below < v < above]
        assert between == ([Fraction(x)] if between else [])


def test_split_cuts_the_fields():
    assert exact.split(0xBC01, Format.named("fp16")) == (1, 15, 1)


def test_messages():
    fp16 = Format.named("fp16")
    with pytest.raises(FewbitsError, match="code 0x10000 is out of range: fp16 has codes 0x0 to 0xffff"):
        exact.decode(65536, fp16)
    with pytest.raises(FewbitsError, match="only stochastic takes one, and needs it"):
        exact.encode(1, fp16, "stochastic")
    with pytest.raises(FewbitsError, match="only stochastic takes one, and needs it"):
        exact.encode(1, fp16, random=3)
    with pytest.raises(
        FewbitsError, match=r"unknown rounding 'nearest': did you mean 'nearest_even'\? choose from nearest_even"
    ):
        exact.encode(1, fp16, "nearest")
