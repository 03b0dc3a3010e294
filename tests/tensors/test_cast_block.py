"""Block formats against exact arithmetic, scale rules, and what NaN, Inf and zeros do to a block."""

import gfloat
import gfloat.formats
import numpy as np
import pytest
import torch
from casting import bits_of
from hypothesis import given, settings
from hypothesis import strategies as st

import fewbits
from fewbits.formats import Format, exact_block, names
from fewbits.tensors.random import random_words

BLOCKS = [n for n in names() if Format.named(n).block]
MX = [n for n in BLOCKS if n != "nvfp4"]


def rules(name):
    return ["two_level", "one_level"] if name == "nvfp4" else ["floor", "ceil", "even", "rceil"]


def judge(x, name, rule, rounding="nearest_even", words=None):
    """Scale codes and element codes of a (M, K) tensor, exactly."""
    fmt = Format.named(name)
    tensor = exact_block.tensor_scale(x.flatten().tolist()) if rule == "two_level" else 1
    scales, codes = [], []
    for row, row_words in zip(x.tolist(), (words if words is not None else x).tolist(), strict=True):
        for start in range(0, len(row), fmt.block.size):
            part = slice(start, start + fmt.block.size)
            random = row_words[part] if words is not None else None
            scale, block = exact_block.encode_block(row[part], fmt, rule, rounding, tensor, random)
            scales.append(scale)
            codes.extend(block)
    return torch.tensor(scales).reshape(len(x), -1), torch.tensor(codes).reshape(x.shape)


def assert_judged(x, name, rule, rounding="nearest_even", seed=None):
    ours = fewbits.encode(x, name, rounding, seed=seed, scale_rule=rule)
    words = None if seed is None else random_words(seed, torch.arange(x.numel())).reshape(x.shape)
    scales, codes = judge(x, name, rule, rounding, words)
    assert ours.scales.tolist() == scales.tolist()
    assert ours.codes.tolist() == codes.tolist()


@pytest.mark.parametrize(("name", "rule"), [(n, r) for n in BLOCKS for r in rules(n)])
def test_random_blocks_equal_exact_arithmetic(name, rule):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(6, 72, generator=generator) * torch.randn(6, 1, generator=generator).mul(9).exp2()
    x[0, 40:] = 0
    x[1, 3], x[1, 50], x[2, 70] = float("nan"), float("inf"), -0.0
    x[3] *= 2.0**-120
    assert_judged(x, name, rule)
    assert_judged(x, name, rule, "up")
    assert_judged(x, name, rule, "stochastic", seed=3)


@settings(max_examples=150)
@given(
    st.sampled_from([(n, r) for n in BLOCKS for r in rules(n)]),
    st.lists(st.floats(width=32), min_size=1, max_size=5),
    st.sampled_from(["nearest_even", "nearest_away", "toward_zero", "up", "down"]),
)
def test_any_block(name_rule, values, rounding):
    assert_judged(torch.tensor([values]), *name_rule, rounding)


@pytest.mark.parametrize("name", MX)
@pytest.mark.parametrize("rule", ["floor", "ceil", "even", "rceil"])
def test_largest_value_about_every_boundary_of_the_scale(name, rule):
    largest = Format.named(name).element.max
    edges = torch.tensor([1, 2, largest, 2 * largest, 2 - 2.0**-4, 2 - 2.0**-3, 2 - 2.0**-7, 1.75, 1.9375, 1.5])
    x = torch.cat([edges, torch.nextafter(edges, edges * 2), torch.nextafter(edges, edges * 0)])[:, None]
    assert_judged(x, name, rule)


@pytest.mark.parametrize("name", MX)
def test_extreme_magnitudes(name):
    x = torch.tensor([[1e300, 1.0], [1e-300, 5e-324], [2.0**-126, 2.0**-149], [2.0**127, -1.0]], dtype=torch.float64)
    assert_judged(x, name, "floor")


@pytest.mark.parametrize("name", BLOCKS)
def test_a_nan_or_an_inf_makes_its_block_nan_and_no_other(name):
    size = Format.named(name).block.size
    x = torch.ones(2, 3 * size)
    x[0, 1], x[1, size + 2], x[1, 2 * size] = float("nan"), float("inf"), float("-inf")
    rounded = fewbits.round_to(x, name)
    lost = torch.zeros_like(x, dtype=torch.bool)
    lost[0, :size] = lost[1, size:] = True
    assert torch.equal(rounded.isnan(), lost)
    assert torch.equal(rounded[~lost], x[~lost])


@pytest.mark.parametrize("name", BLOCKS)
def test_zeros_stay_zeros(name):
    x = torch.tensor([[0.0, -0.0] * 40])
    codes = fewbits.encode(x, name)
    assert codes.scales.eq(0).all()
    keeps_sign = Format.named(name).element.has_negative_zero
    assert torch.equal(bits_of(fewbits.round_to(x, name)), bits_of(x if keeps_sign else x.abs()))


@pytest.mark.parametrize("name", BLOCKS)
@pytest.mark.parametrize("K", [1, 15, 16, 31, 33, 100])
def test_a_short_last_block_rounds_as_if_filled_with_zeros(name, K):
    x = torch.randn(3, K, generator=torch.Generator().manual_seed(K))
    size = Format.named(name).block.size
    filled = torch.nn.functional.pad(x, (0, -K % size))
    assert torch.equal(fewbits.round_to(x, name), fewbits.round_to(filled, name)[:, :K])
    assert fewbits.encode(x, name).scales.shape == (3, -(-K // size))


def test_blocks_do_not_straddle_rows():
    x = torch.tensor([[1.0] * 8, [1000.0] * 8])
    assert fewbits.encode(x, "mxfp4").scales.tolist() == [[125], [134]]


def test_rounding_twice_is_rounding_once():
    x = torch.randn(16, 64, generator=torch.Generator().manual_seed(5))
    for name in MX:
        once = fewbits.round_to(x, name, scale_rule="rceil")
        assert torch.equal(fewbits.round_to(once, name, scale_rule="rceil"), once)


@pytest.mark.parametrize(
    ("name", "theirs"),
    [
        ("mxfp8", "mxfp8_e4m3"),
        ("mxfp8_e5m2", "mxfp8_e5m2"),
        ("mxfp6_e2m3", "mxfp6_e2m3"),
        ("mxfp6_e3m2", "mxfp6_e3m2"),
        ("mxfp4", "mxfp4_e2m1"),
    ],
)
def test_equals_gfloat(name, theirs):
    info = getattr(gfloat.formats, f"format_info_{theirs}")
    x = torch.randn(8, 32, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    quantized = [gfloat.quantize_block(info, row, gfloat.compute_scale_amax) for row in x.numpy()]
    assert torch.equal(fewbits.round_to(x, name), torch.from_numpy(np.stack(quantized)))


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        (
            "mxfp4",
            {"scales": torch.zeros(2, 3, dtype=torch.uint8)},
            r"\(2, 3\) do not fit codes of shape \(2, 40\); .*\(2, 2\)",
        ),
        ("mxfp4", {"codes": torch.full((2, 40), 16)}, "code 16 is out of range: mxfp4 has codes 0 to 15"),
        ("mxfp4", {"scales": torch.full((2, 2), 256)}, "code 256 is out of range: e8m0fnu has codes 0 to 255"),
        ("mxfp4", {"tensor_scale": torch.ones(())}, "the format has no tensor_scale; take what encode returned"),
        ("nvfp4", {"tensor_scale": None}, "the format needs tensor_scale; take what encode returned"),
        ("mxfp4", {"codes": torch.zeros(2, 0, dtype=torch.uint8)}, "a block needs a last dimension of 1 or more"),
    ],
)
def test_codes_that_do_not_belong_together(name, change, message):
    blocks = fewbits.encode(torch.ones(2, 40), name)._replace(**change)
    with pytest.raises(fewbits.FewbitsError, match=message):
        fewbits.decode(blocks, name)
