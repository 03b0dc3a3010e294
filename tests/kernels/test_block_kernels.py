"""The compiled block formats are bit-equal to their meaning. ``test_isa.py`` runs this for every instruction set."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fewbits.formats import Format, Overflow, Rounding, ScaleRule
from fewbits.kernels import cast, native
from fewbits.tensors.block import block_codes, to_blocks
from fewbits.tensors.codes import How

pytestmark = pytest.mark.skipif(not native.status().loaded, reason="the compiled kernels are not loaded")

MX = ("mxfp8", "mxfp8_e5m2", "mxfp6_e2m3", "mxfp6_e3m2", "mxfp4", "mxint8")
MX_RULES = (ScaleRule.FLOOR, ScaleRule.CEIL, ScaleRule.EVEN, ScaleRule.RCEIL)
NVFP4_RULES = (ScaleRule.TWO_LEVEL, ScaleRule.ONE_LEVEL)
CASES = [(name, rule) for name in MX for rule in MX_RULES] + [("nvfp4", rule) for rule in NVFP4_RULES]
SHAPES = [(1, 1), (3, 32), (5, 33), (2, 100), (4, 2048), (2, 5000), (0, 32), (300, 64)]


def numbers(shape: tuple[int, int], seed: int) -> torch.Tensor:
    """Normal numbers in rows of very different size, with zeros, a subnormal row, ties, NaN and Inf among them."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator)
    x *= torch.tensor(2.0) ** torch.randint(-140, 120, (shape[0], 1), generator=generator)
    pick = torch.rand(shape, generator=generator)
    x[pick < 0.05] = 0.0
    x[pick > 0.999] = torch.nan
    x[(pick > 0.998) & (pick < 0.999)] = -torch.inf
    ties = torch.tensor([0.25, 0.75, -1.25, 2.5, 3.5, -5.0, 6.0, 448.0])
    return torch.where(pick > 0.9, ties[torch.randint(0, 8, shape, generator=generator)], x)


def assert_same(x: torch.Tensor, name: str, rule: ScaleRule, rounding: Rounding) -> None:
    fmt, how = Format.named(name), How(rounding, Overflow.SATURATE)
    found, (expected, _) = block_codes(x, fmt, how, rule), to_blocks(x, fmt, how, rule)
    assert torch.equal(found.scales, expected.scales)
    assert torch.equal(found.codes, expected.codes)
    assert (found.tensor_scale is None) == (expected.tensor_scale is None)
    if found.tensor_scale is not None:
        assert torch.equal(found.tensor_scale, expected.tensor_scale)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("name", "rule"), CASES)
def test_block_formats(name: str, rule: ScaleRule, shape: tuple[int, int]) -> None:
    assert_same(numbers(shape, seed=1), name, rule, Rounding.NEAREST_EVEN)


@pytest.mark.parametrize("rounding", list(Rounding)[:-1])
@pytest.mark.parametrize("name", ["mxfp8", "mxint8", "nvfp4"])
def test_every_rounding_by_kernel_or_not(name: str, rounding: Rounding) -> None:
    rule = ScaleRule.TWO_LEVEL if name == "nvfp4" else ScaleRule.FLOOR
    assert_same(numbers((7, 70), seed=2), name, rule, rounding)


@settings(deadline=None, max_examples=80)
@given(st.lists(st.floats(width=32), min_size=1, max_size=70), st.sampled_from(CASES))
def test_any_row(values: list[float], case: tuple[str, ScaleRule]) -> None:
    assert_same(torch.tensor([values]), *case, Rounding.NEAREST_EVEN)


def test_a_kernel_ran() -> None:
    """Or the tests above compare the meaning with itself."""
    x = torch.randn(2, 64)
    codes, scales = torch.empty(2, 64, dtype=torch.uint8), torch.empty(2, 4, dtype=torch.uint8)
    assert cast.mx_encode(
        x, Format.named("mxfp4"), Rounding.NEAREST_EVEN, 2, 1 << 52, codes, scales[:, :2].contiguous()
    )
    assert cast.nvfp4_encode(x, Format.named("nvfp4"), Rounding.NEAREST_EVEN, 1.0, codes, scales)
    assert not cast.mx_encode(x, Format.named("mxfp4"), Rounding.UP, 2, 1 << 52, codes, scales)
    assert cast.finite_amax(torch.tensor([1.0, -3.0, torch.inf, torch.nan])) == 3.0
