"""The attention op beside its plain-PyTorch meaning. ``test_isa.py`` runs this file for every instruction set."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fewbits.errors import FewbitsError
from fewbits.kernels.attention import attention, reference

EPS = torch.finfo(torch.float32).eps
# B, T, Q, G, S, D: one of each; grouped; every head its own; more rows than are few; odd channels; many positions
SHAPES = [
    (1, 1, 1, 1, 1, 1),
    (1, 1, 32, 8, 300, 64),
    (2, 1, 9, 3, 65, 64),
    (3, 2, 4, 4, 64, 32),
    (1, 5, 6, 2, 70, 80),
    (2, 16, 8, 2, 129, 16),
    (1, 3, 7, 1, 40, 6),
    (1, 1, 8, 4, 1000, 128),
    (1, 40, 4, 2, 300, 24),
]


def heads(B: int, T: int, Q: int, G: int, S: int, D: int, *, dtype: torch.dtype = torch.float32, seed: int = 0) -> Any:
    generator = torch.Generator().manual_seed(seed)
    shapes = (B, Q, T, D), (B, G, S, D), (B, G, S, D)
    return [torch.randn(*shape, generator=generator).to(dtype) for shape in shapes]


def assert_close(got: Tensor, expected: Tensor) -> None:
    """Weights are e^score with relative errors of a few ULP of the score, here below 100; sums average them out."""
    assert got.shape == expected.shape
    assert got.dtype == expected.dtype
    assert got.is_contiguous()
    assert torch.equal(got.isnan(), expected.isnan())
    allowed = 4 * torch.finfo(torch.bfloat16).eps if got.dtype == torch.bfloat16 else 100 * EPS
    got, expected = got.nan_to_num().double(), expected.nan_to_num().double()
    assert (got - expected).abs().max() <= allowed * max(1.0, expected.abs().max())


def check(tensors: list[Tensor], mask: Tensor | None = None, scale: float = 0.2, causal: bool = False) -> None:
    assert_close(attention(*tensors, mask, scale, causal), reference(*tensors, mask, scale, causal))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_all_positions_the_earlier_ones_or_those_of_a_mask(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    tensors = heads(*shape, dtype=dtype)
    B, T, _, _, S, _ = shape
    check(tensors)
    check(tensors, causal=True)
    mask = torch.rand(B, 1, T, S, generator=torch.Generator().manual_seed(1)) < 0.5
    mask[0, 0, 0] = False  # who sees nothing gets 0
    check(tensors, mask)
    assert attention(*tensors, mask, 0.2)[0, 0].eq(0).all()


sizes = st.integers(1, 20)


@settings(deadline=None, max_examples=60)
@given(sizes, sizes, st.integers(1, 5), st.integers(1, 4), st.integers(0, 150), sizes, st.integers(0, 2**30))
def test_any_shape(B: int, T: int, G: int, repeats: int, past: int, D: int, seed: int) -> None:
    check(heads(B % 3 + 1, T, G * repeats, G, past + T, D, seed=seed), causal=bool(seed % 2))


def test_more_queries_than_positions() -> None:
    check(heads(2, 9, 4, 2, 3, 8))


def test_any_strides() -> None:
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(2, 3, 4 * 16, generator=generator).view(2, 3, 4, 16).transpose(1, 2)
    key, value = (torch.randn(2, 30, 2, 16, generator=generator).transpose(1, 2) for _ in range(2))
    check([query, key, value], causal=True)
    check([each.mT.contiguous().mT for each in (query, key, value)])
    room = torch.randn(2, 2, 50, 16, generator=generator)
    check([query, room[:, :, 5:40], room[:, :, 10:45]])
    mask = torch.rand(1, 1, 1, 60, generator=generator) < 0.5
    check([query, key, value], mask[..., ::2].expand(2, 1, 3, 30))
    check([query, key, value], mask[..., :30])


def test_large_scores_do_not_overflow() -> None:
    check([each * 30 for each in heads(1, 2, 4, 2, 100, 32)], scale=1.0)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_bad_query_spoils_itself_only(bad: float) -> None:
    query, key, value = heads(2, 3, 4, 2, 70, 16)
    clean = attention(query, key, value, None, 0.2)
    query[1, 2, 1, 5] = bad
    got = attention(query, key, value, None, 0.2)
    assert got[1, 1, 2].isnan().all()
    got[1, 1, 2] = clean[1, 1, 2]
    assert torch.equal(got, clean)


def test_a_bad_position_is_seen_by_later_queries_only() -> None:
    query, key, value = heads(1, 5, 4, 2, 70, 16)
    value[0, 1, 67, 3] = torch.nan
    got = attention(query, key, value, None, 0.2, True)
    bad = got.isnan()
    assert bad[0, 2:, 2:, 3].all()
    assert bad.sum() == 6


def test_no_texts_and_no_queries() -> None:
    assert attention(*heads(0, 1, 4, 2, 8, 16), None, 0.2).shape == (0, 1, 4, 16)
    assert attention(*heads(2, 0, 4, 2, 8, 16), None, 0.2).shape == (2, 0, 4, 16)
    assert attention(*heads(2, 1, 4, 2, 0, 16), None, 0.2).eq(0).all()


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_any_number_of_threads(threads: int) -> None:
    tensors = heads(2, 2, 4, 2, 700, 64)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        check(tensors, causal=True)
    finally:
        torch.set_num_threads(before)


def test_the_op_passes_the_checks_of_torch() -> None:
    mask = torch.ones(1, 1, 2, 9, dtype=torch.bool)
    for arguments in ((None, 0.3, True), (mask, 0.3, False)):
        torch.library.opcheck(
            torch.ops.fewbits.attention.default,
            (*heads(1, 2, 4, 2, 9, 8), *arguments),
            test_utils=("test_schema", "test_faketensor"),
        )


def test_wrong_tensors_are_named() -> None:
    query, key, value = heads(2, 2, 4, 2, 9, 8)
    mask = torch.ones(2, 1, 2, 9, dtype=torch.bool)
    cases: list[tuple[tuple[Any, ...], str]] = [
        ((query.half(), key, value, None), "all float32 or all bfloat16 are needed, got torch.float16"),
        ((query, key.bfloat16(), value, None), "torch.float32, torch.bfloat16 and torch.float32; convert them"),
        ((query[0], key, value, None), r"\[B, heads, tokens, D\] are needed, got \[4, 2, 8\]"),
        ((query[:, :3], key, value, None), r"G a divisor of 3 are needed, got \[2, 2, 9, 8\]"),
        ((query, key, value[..., :7], None), r"\[2, G, S, 8\] .* got \[2, 2, 9, 8\] and \[2, 2, 9, 7\]"),
        ((query, key, value, mask.float()), r"mask: bool \[2, 1, 2, 9\] is needed, got torch.float32"),
        ((query, key, value, mask[..., :8]), r"mask: bool \[2, 1, 2, 9\] is needed, got torch.bool \[2, 1, 2, 8\]"),
    ]
    for arguments, message in cases:
        with pytest.raises(FewbitsError, match=message):
            attention(*arguments, 0.3)
    with pytest.raises(FewbitsError, match="causal: 2 queries are more than the 1 positions"):
        attention(query, key[:, :, :1], value[:, :, :1], None, 0.3, True)
