import math
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fewbits import FewbitsError
from fewbits.formats import Format, literal

FORMATS = [Format.named(n) for n in ("fp32", "fp16", "bf16", "e4m3fn")]


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("0.1", Fraction(1, 10)),
        ("-2.5e-3", Fraction(-1, 400)),
        ("1/3", Fraction(1, 3)),
        ("+7", 7),
        ("1e400", 10**400),
        ("0x1.8p-3", Fraction(3, 16)),
        ("-0x.8p1", -1),
        ("0X1P4", 16),
        ("inf", math.inf),
        ("-Infinity", -math.inf),
        ("0x3C00", 1),
        ("bf16:0x3f80", 1),
        ("0x3F800000", 1),
        ("0b00111000", 1),
        ("tf32:0x1FC00", 1),
        ("1_000", 1000),
    ],
)
def test_numbers(text, value):
    assert literal.parse(text, FORMATS)[0] == value


def test_negative_zero_keeps_its_sign():
    assert math.copysign(1, literal.parse("-0")[0]) == -1
    assert math.isnan(literal.parse("nan")[0])


def test_a_bit_pattern_says_how_it_was_read():
    assert literal.parse("0x3C00", FORMATS)[1] == "0x3c00 read as a code of fp16"


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_hex_floats_round_trip(x):
    assert literal.parse(x.hex())[0] == x


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_decimals_are_exact(x):
    assert Fraction(literal.decimal(Fraction(x))) == Fraction(x)


@pytest.mark.parametrize("text", ["", "abc", "1/0", "0x", "0x1p", "1e999999999", "0x1p99999999", "--1", "1..2", "0xp1"])
def test_not_a_number(text):
    with pytest.raises(FewbitsError, match=r"is not a number: write a decimal \(0.1\), a fraction"):
        literal.parse(text, FORMATS)


def test_a_pattern_that_fits_no_format():
    with pytest.raises(
        FewbitsError, match="bit pattern '0x123' has 12 bits, and none of fp32, fp16, bf16, e4m3fn has as"
    ):
        literal.parse("0x123", FORMATS)
    with pytest.raises(FewbitsError, match="code 0x10000 is out of range"):
        literal.parse("fp16:0x10000", FORMATS)
