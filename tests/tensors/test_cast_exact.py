"""Casts against exact arithmetic: every value, every tie and a hair to either side of both, in every mode."""

import pytest
import torch
from casting import DIRECTED, ELEMENTS, SPECIALS, adversarial, bits_of, judged
from hypothesis import given, settings
from hypothesis import strategies as st

import fewbits
from fewbits.formats import Format, exact
from fewbits.tensors.random import random_words

PARAMETRIC = ["e5m3", "e2m5", "e3m3fn", "e6m9", "e11m4", "e4m3b11fnuz", "e5m0fn", "e1m2fn", "e8m3fn"]
JUDGED = [name for name in [*ELEMENTS, *PARAMETRIC] if name != "fp64"]


def overflows(name):
    return ["ieee", "saturate"] if Format.named(name).has_nan else ["saturate"]


def differing(x, name, *args, random=None, **kwargs):
    """The inputs that we round otherwise than exact arithmetic does."""
    ours = fewbits.encode(x, name, *args, **kwargs).to(torch.int64)
    return x[ours != judged(x, name, *args, random=random)].tolist()


@pytest.mark.parametrize("name", JUDGED)
def test_nearest_even_from_float64(name):
    assert differing(adversarial(name), name) == []


@pytest.mark.parametrize("rounding", DIRECTED)
@pytest.mark.parametrize("name", JUDGED)
def test_every_mode_and_overflow_rule(name, rounding):
    x = adversarial(name)
    for offset, overflow in enumerate(overflows(name)):
        assert differing(x[offset :: 2 + len(x) // 250], name, rounding, overflow) == []
        assert differing(torch.tensor(SPECIALS, dtype=torch.float64), name, rounding, overflow) == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", JUDGED)
def test_every_input_dtype(name, dtype):
    x = adversarial(name, dtype)
    assert differing(x[:: 1 + len(x) // 250], name) == []


@pytest.mark.parametrize("name", JUDGED)
def test_stochastic_is_bit_equal_too(name):
    x = adversarial(name)
    x = x[:: 1 + len(x) // 250]
    words = random_words(11, torch.arange(x.numel()))
    assert differing(x, name, "stochastic", random=words, seed=11) == []


@pytest.mark.parametrize("name", [n for n in [*ELEMENTS, *PARAMETRIC] if Format.named(n).bits <= 16])
def test_every_code_decodes_exactly(name):
    fmt = Format.named(name)
    codes = torch.arange(2**fmt.bits)
    expected = torch.tensor([float(exact.decode(code, fmt)) for code in codes.tolist()], dtype=torch.float64)
    assert torch.equal(bits_of(fewbits.decode(codes, name, dtype=torch.float64)), bits_of(expected))


@settings(max_examples=200)
@given(st.floats(), st.sampled_from([*JUDGED, "fp64"]), st.sampled_from(DIRECTED))
def test_any_double(x, name, rounding):
    tensor = torch.tensor([x], dtype=torch.float64)
    code = int(fewbits.encode(tensor, name, rounding).view(-1).to(torch.int64)) % 2**64
    assert code == exact.encode(x, Format.named(name), rounding)
