import dataclasses
import sys

import ml_dtypes
import pytest
import torch

import fewbits
from fewbits.formats import Format, names

TORCH = {
    "fp64": torch.float64,
    "fp32": torch.float32,
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
    "e4m3fn": torch.float8_e4m3fn,
    "e5m2": torch.float8_e5m2,
}


@pytest.mark.parametrize("name", TORCH)
def test_derived_limits_equal_torch_finfo(name):
    ours, theirs = Format.named(name), torch.finfo(TORCH[name])
    assert ours.bits == theirs.bits
    assert (ours.max, ours.min, ours.smallest_normal, ours.eps) == (theirs.max, theirs.min, theirs.tiny, theirs.eps)


@pytest.mark.parametrize("name", ["fp16", "bf16", "e4m3fn", "e5m2"])
def test_smallest_subnormal_equals_ml_dtypes(name):
    dtype = {
        "fp16": "float16",
        "bf16": ml_dtypes.bfloat16,
        "e4m3fn": ml_dtypes.float8_e4m3fn,
        "e5m2": ml_dtypes.float8_e5m2,
    }
    assert Format.named(name).smallest_subnormal == float(ml_dtypes.finfo(dtype[name]).smallest_subnormal)


def test_integers_are_rows_too():
    int8 = Format.named("int8")
    assert (int8.bits, int8.min, int8.max, int8.eps) == (8, -128, 127, 1)
    assert type(int8.max) is int


def test_tf32_is_19_bits_in_a_word_of_32():
    tf32 = Format.named("tf32")
    assert (tf32.bits, tf32.bits_per_value) == (19, 32)
    assert tf32.max == (2 - 2**-10) * 2.0**127


def test_inf_and_nan():
    assert [(n, f.has_inf, f.has_nan) for n in ("fp16", "e4m3fn", "int8") for f in [Format.named(n)]] == [
        ("fp16", True, True),
        ("e4m3fn", False, True),
        ("int8", False, False),
    ]


@pytest.mark.parametrize(
    ("alias", "name"),
    [
        ("half", "fp16"),
        ("FLOAT16", "fp16"),
        ("fp8", "e4m3fn"),
        ("bfloat16", "bf16"),
        ("float32", "fp32"),
        ("double", "fp64"),
        ("torch.float8_e5m2", "e5m2"),
        (" int8 ", "int8"),
    ],
)
def test_aliases(alias, name):
    assert fewbits.Format.named(alias).name == name


def test_every_name_and_alias_is_found_and_belongs_to_one_format():
    rows = [Format.named(name) for name in names()]
    spellings = [s for row in rows for s in (row.name, *row.aliases)]
    assert len(spellings) == len(set(spellings))
    assert all(Format.named(s) is row for row in rows for s in row.aliases)
    assert all(row.use and row.section for row in rows)


def test_a_format_is_frozen_and_names_itself():
    fp16 = Format.named("fp16")
    assert Format.named(fp16) is fp16
    with pytest.raises(dataclasses.FrozenInstanceError):
        fp16.bias = 3


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ("fp17", "unknown format 'fp17': did you mean 'fp16'? `fewbits formats` lists them"),
        ("bfloat17", "unknown format 'bfloat17': did you mean 'bfloat16'? `fewbits formats` lists them"),
        ("", "unknown format '': `fewbits formats` lists them"),
    ],
)
def test_an_unknown_name_suggests_the_nearest(wrong, message):
    with pytest.raises(fewbits.FewbitsError) as error:
        Format.named(wrong)
    assert str(error.value) == message


def test_overflow_rule_messages():
    with pytest.raises(
        fewbits.FewbitsError, match=r"overflow 'ieee' needs an Inf or a NaN, and int8 has neither: use 's"
    ):
        Format.named("int8").overflow_rule("ieee")
    with pytest.raises(fewbits.FewbitsError, match=r"unknown overflow 'wrap': choose from saturate, ieee"):
        Format.named("fp16").overflow_rule("wrap")


def test_the_formats_layer_needs_the_standard_library_only():
    import subprocess

    code = "import sys, fewbits.formats, fewbits.formats.literal; print({'torch', 'numpy'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "set()\n"
