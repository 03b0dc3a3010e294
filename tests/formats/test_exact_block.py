from fractions import Fraction

import pytest

from fewbits import FewbitsError
from fewbits.formats import Format
from fewbits.formats.exact_block import block_scale, encode_block, tensor_scale

MXFP4, NVFP4 = Format.named("mxfp4"), Format.named("nvfp4")


@pytest.mark.parametrize(
    ("amax", "floor", "ceil", "even", "rceil"),  # exponents of the scale; e2m1fn: emax 2, largest 6
    [(4, 0, 0, 0, 0), (6, 0, 1, 0, 0), (6.5, 0, 1, 0, 1), (7, 0, 1, 1, 1), (8, 1, 1, 1, 1), (3, -1, 0, -1, -1)],
)
def test_scale_rules_by_hand(amax, floor, ceil, even, rceil):
    got = [block_scale([0.5, -amax], MXFP4, rule) - 127 for rule in ("floor", "ceil", "even", "rceil")]
    assert got == [floor, ceil, even, rceil]


def test_a_block_by_hand():
    scale, codes = encode_block([12, -1, 0.6, 0, -0.0], MXFP4)  # scale 2^(3 - 2) = 2: 6, -0.5, 0.3, 0, -0
    assert (scale, codes) == (128, [0b0111, 0b1001, 0b0001, 0b0000, 0b1000])


def test_nvfp4_by_hand():
    assert tensor_scale([2688, -3]) == 1
    assert tensor_scale([0, -0.0]) == 1
    scale, codes = encode_block([12, -6, 1], NVFP4)  # block scale 12 / 6 = 2 in e4m3fn
    assert (scale, codes) == (0x40, [0b0111, 0b1101, 0b0001])
    assert block_scale([1e-9], NVFP4) == 1  # not 0: that would erase the block


def test_nan_inf_and_zero():
    assert encode_block([1, float("nan")], MXFP4) == (0xFF, [0, 0])
    assert encode_block([1, float("-inf")], NVFP4) == (0x7F, [0, 0])
    assert encode_block([0, -0.0], MXFP4) == (0, [0, 8])


def test_scales_clamp():
    assert block_scale([Fraction(2) ** 400], MXFP4) == 254
    assert block_scale([Fraction(2) ** -400], MXFP4) == 0


def test_messages():
    with pytest.raises(FewbitsError, match="fp16 has no shared scale"):
        Format.named("fp16").scale_rule("floor")
    with pytest.raises(FewbitsError, match="scale rule 'rceil' is not for nvfp4: choose from two_level, one_level"):
        block_scale([1], NVFP4, "rceil")
