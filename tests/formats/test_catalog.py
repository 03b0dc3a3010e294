import gfloat.formats
import ml_dtypes
import numpy as np
import pytest

from fewbits import FewbitsError
from fewbits.formats import Format, exact, names
from fewbits.formats.codebooks import normal_float
from fewbits.formats.dialects import BY_NAME, DIALECTS

# From the specifications: bits, bias, max, its code, smallest normal, smallest subnormal, eps, +Inf code, NaN code
ROWS = {
    "fp64": (
        64,
        1023,
        1.7976931348623157e308,
        0x7FEFFFFFFFFFFFFF,
        2**-1022,
        2**-1074,
        2**-52,
        0x7FF << 52,
        0xFFF << 51,
    ),
    "fp32": (32, 127, 3.4028234663852886e38, 0x7F7FFFFF, 2**-126, 2**-149, 2**-23, 0x7F800000, 0x7FC00000),
    "tf32": (19, 127, 3.4011621342146535e38, 0x3FBFF, 2**-126, 2**-136, 2**-10, 0x3FC00, 0x3FE00),
    "fp16": (16, 15, 65504, 0x7BFF, 2**-14, 2**-24, 2**-10, 0x7C00, 0x7E00),
    "bf16": (16, 127, 3.3895313892515355e38, 0x7F7F, 2**-126, 2**-133, 2**-7, 0x7F80, 0x7FC0),
    "e4m3fn": (8, 7, 448, 0x7E, 2**-6, 2**-9, 2**-3, None, 0x7F),
    "e5m2": (8, 15, 57344, 0x7B, 2**-14, 2**-16, 2**-2, 0x7C, 0x7E),
    "e4m3fnuz": (8, 8, 240, 0x7F, 2**-7, 2**-10, 2**-3, None, 0x80),
    "e5m2fnuz": (8, 16, 57344, 0x7F, 2**-15, 2**-17, 2**-2, None, 0x80),
    "e4m3b11fnuz": (8, 11, 30, 0x7F, 2**-10, 2**-13, 2**-3, None, 0x80),
    "e4m3": (8, 7, 240, 0x77, 2**-6, 2**-9, 2**-3, 0x78, 0x7C),
    "e3m4": (8, 3, 15.5, 0x6F, 2**-2, 2**-6, 2**-4, 0x70, 0x78),
    "e8m0fnu": (8, 127, 2.0**127, 0xFE, 2**-127, 2**-127, 1, None, 0xFF),
    "e2m3fn": (6, 1, 7.5, 0x1F, 1, 2**-3, 2**-3, None, 0x1F),
    "e3m2fn": (6, 3, 28, 0x1F, 2**-2, 2**-4, 2**-2, None, 0x1F),
    "e2m1fn": (4, 1, 6, 0x7, 1, 0.5, 0.5, None, 0x7),
    "binary8p3se": (8, 16, 49152, 0x7E, 2**-15, 2**-17, 2**-2, 0x7F, 0x80),
    "binary8p4se": (8, 8, 224, 0x7E, 2**-7, 2**-10, 2**-3, 0x7F, 0x80),
    "int8": (8, 0, 127, 0x7F, 1, 1, 1, None, 0),
    "uint8": (8, 0, 255, 0xFF, 1, 1, 1, None, 0),
    "int4": (4, 0, 7, 0x7, 1, 1, 1, None, 0),
    "uint4": (4, 0, 15, 0xF, 1, 1, 1, None, 0),
    "int2": (2, 0, 1, 0x1, 1, 1, 1, None, 0),
}
NF4 = [-1, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334]
NF4 += [-0.09105003625154495, 0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224]
NF4 += [0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1]


@pytest.mark.parametrize("name", ROWS)
def test_derived_properties(name):
    fmt = Format.named(name)
    derived = (fmt.bits, fmt.bias, fmt.max, fmt.max_code, fmt.smallest_normal, fmt.smallest_subnormal, fmt.eps)
    assert (*derived, fmt.inf_code, fmt.nan_code) == ROWS[name]
    assert fmt.has_inf == (fmt.inf_code is not None)


def test_every_single_format_of_the_catalog_is_covered():
    assert {n for n in names() if Format.named(n).block is None} - {"nf4"} <= set(ROWS)


def test_nf4_is_computed_to_the_bit():
    assert list(normal_float(4)) == NF4
    nf4 = Format.named("nf4")
    assert (nf4.bits, nf4.max, nf4.min, nf4.nan_code, nf4.has_nan) == (4, 1, -1, 7, False)


@pytest.mark.parametrize("name", ["e4m3fn", "e5m2", "e4m3fnuz", "e5m2fnuz", "e4m3b11fnuz", "e4m3", "e3m4", "e8m0fnu"])
def test_8_bit_codes_decode_as_ml_dtypes(name):
    theirs = np.arange(256, dtype=np.uint8).view(getattr(ml_dtypes, f"float8_{name}")).astype(np.float64)
    ours = [float(exact.decode(code, Format.named(name))) for code in range(256)]
    np.testing.assert_array_equal(np.array(ours), theirs)
    np.testing.assert_array_equal(np.signbit(ours)[~np.isnan(ours)], np.signbit(theirs)[~np.isnan(ours)])


@pytest.mark.parametrize("name", ["e3m2fn", "e2m3fn", "e2m1fn", "int4", "uint4", "int2"])
def test_narrow_codes_decode_as_ml_dtypes(name):
    fmt = Format.named(name)
    dtype = getattr(ml_dtypes, name if "int" in name else f"float{fmt.bits}_{name}")
    codes = np.arange(1 << fmt.bits, dtype=np.uint8)
    signed = np.where(codes >= fmt.sign_bit, codes.astype(int) - (1 << fmt.bits), codes) if "int" in name else None
    theirs = codes.view(dtype) if signed is None or not fmt.signed else signed.astype(dtype)
    assert [float(exact.decode(int(code), fmt)) for code in codes] == theirs.astype(np.float64).tolist()


@pytest.mark.parametrize(("name", "precision"), [("binary8p3se", 3), ("binary8p4se", 4)])
def test_p3109_codes_decode_as_gfloat(name, precision):
    info = gfloat.formats.format_info_p3109(8, precision)
    theirs = [gfloat.decode_float(info, code).fval for code in range(256)]
    np.testing.assert_array_equal([float(exact.decode(code, Format.named(name))) for code in range(256)], theirs)


def test_block_formats_count_their_scales():
    sizes = {"mxfp8": 8.25, "mxfp8_e5m2": 8.25, "mxfp6_e2m3": 6.25, "mxfp6_e3m2": 6.25, "mxfp4": 4.25, "mxint8": 8.25}
    assert {name: float(Format.named(name).bits_per_value) for name in sizes} == sizes
    assert Format.named("nvfp4").bits_per_value == 4.5
    assert Format.named("mxfp4").max == 6 * 2.0**127
    assert Format.named("mxint8").element.max == 1 + 63 / 64
    assert Format.named("mxint8").element.min == -(1 + 63 / 64)


# --- eXmY by name -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "bits", "bias", "largest", "has_inf", "has_nan"),
    [
        ("e5m3", 9, 15, 61440, True, True),
        ("E6M9", 16, 31, (2 - 2**-9) * 2**31, True, True),
        ("e3m3fn", 7, 3, 28, False, True),
        ("e2m2fn", 5, 1, 7, False, False),
        ("e4m4fnuz", 9, 8, 248, False, True),
        ("e4m3b11", 8, 11, 15, True, True),
        ("e5m0fn", 6, 15, 65536, False, False),
        ("e11m4", 16, 1023, 1.9375 * 2.0**1023, True, True),
    ],
)
def test_formats_read_from_their_name(name, bits, bias, largest, has_inf, has_nan):
    fmt = Format.named(name)
    assert (fmt.bits, fmt.bias, fmt.max, fmt.has_inf, fmt.has_nan) == (bits, bias, largest, has_inf, has_nan)


def test_a_name_in_the_catalog_is_the_catalogs():
    assert Format.named("e5m10") is Format.named("fp16")
    assert Format.named("e8m7") is Format.named("bf16")
    assert Format.named("e2m1") is Format.named("e2m1fn")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("e8m8", "format 'e8m8' has 17 bits: eXmY names reach to 16, sign included"),
        ("e0m3", "format 'e0m3' has no exponent: use an integer format such as int8"),
        ("e1m2", "format 'e1m2' is too narrow for Inf and NaN: use e1m2fn, which is finite"),
        ("e5m0", "format 'e5m0' is too narrow for Inf and NaN: use e5m0fn, which is finite"),
        ("e11m4fnuz", "format 'e11m4fnuz' exceeds the range of a double: take fewer exponent bits or another bias"),
        ("e12m3", "format 'e12m3' exceeds the range of a double"),
    ],
)
def test_impossible_names(name, message):
    with pytest.raises(FewbitsError, match=message):
        Format.named(name)


# --- dialects ---------------------------------------------------------------------------------------------------------

FP8 = ("e4m3fn", "e5m2", "e4m3fnuz", "e5m2fnuz", "e8m0fnu")


@pytest.mark.parametrize("name", FP8)
@pytest.mark.parametrize("value", [1.9, float("inf")])
def test_dialects_say_what_torch_and_ml_dtypes_do(name, value):
    import torch

    fmt = Format.named(name)
    beyond = np.float32(value * fmt.max)
    said = {d: float(exact.decode(exact.encode(float(beyond), fmt, overflow=d), fmt)) for d in ("torch", "ml_dtypes")}
    with np.errstate(over="ignore"):
        run = float(np.array([beyond]).astype(getattr(ml_dtypes, f"float8_{name}"))[0])
    np.testing.assert_equal(said["ml_dtypes"], run)
    if tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 12):
        run = torch.tensor([beyond]).to(getattr(torch, f"float8_{name}")).float().item()
        np.testing.assert_equal(said["torch"], run)


def test_a_dialect_is_a_setting():
    e4m3fn = Format.named("e4m3fn")
    assert exact.encode(1000, e4m3fn, overflow="cuda") == 0x7E
    assert exact.encode(1000, e4m3fn, overflow="ml_dtypes") == 0x7F
    assert exact.encode(1000, Format.named("e2m1fn"), overflow="ml_dtypes") == 0x7  # nothing to overflow to
    assert len(BY_NAME) == len(DIALECTS)
