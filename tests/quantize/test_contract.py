"""Contracts on loss as data: limits, and which precisions of groups meet them in the fewest bytes."""

import itertools
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fewbits.errors import FewbitsError
from fewbits.quantize.assignment import best, bytes_of, cheapest, fewest_bytes, least_loss, loss_of
from fewbits.quantize.contract import Contract, allowed_precisions, bytes_named
from fewbits.quantize.sensitivity import worth_trying

WRITES = ("int8", "int8-weight", "int4", "mxfp4", "fp8")
OPTION = st.tuples(st.integers(1, 100), st.floats(0, 1, allow_subnormal=False))
GROUPS = st.dictionaries(
    st.sampled_from("abcd"), st.dictionaries(st.sampled_from(WRITES[:3]), OPTION, min_size=1), min_size=1
)
SLACK = 1e-9


def choices(groups: dict) -> list[dict]:
    return [dict(zip(groups, each, strict=True)) for each in itertools.product(*groups.values())]


def largest_step(groups: dict) -> int:
    return max(max(n for n, _ in options.values()) - min(n for n, _ in options.values()) for options in groups.values())


@given(GROUPS, st.floats(0, 3))
def test_fewest_bytes_are_within_one_step_of_the_fewest(groups: dict, limit: float) -> None:
    chosen = fewest_bytes(groups, limit)
    allowed = [each for each in choices(groups) if loss_of(groups, each) <= limit * (1 - SLACK)]
    if chosen is None:
        assert not allowed
        return
    assert chosen.keys() == groups.keys()
    assert loss_of(groups, chosen) <= limit + SLACK
    if allowed:
        assert bytes_of(groups, chosen) <= min(bytes_of(groups, each) for each in allowed) + largest_step(groups)


@given(GROUPS, st.integers(1, 400))
def test_least_loss_fits_and_is_never_worse_than_the_cheapest(groups: dict, room: int) -> None:
    chosen = least_loss(groups, room)
    allowed = [each for each in choices(groups) if bytes_of(groups, each) <= room]
    assert (chosen is None) == (not allowed)
    if chosen is not None:
        assert bytes_of(groups, chosen) <= room
        assert loss_of(groups, chosen) <= loss_of(groups, cheapest(groups)) + SLACK


@given(GROUPS)
def test_the_ends(groups: dict) -> None:
    assert bytes_of(groups, cheapest(groups)) == min(bytes_of(groups, each) for each in choices(groups))
    least = loss_of(groups, best(groups))
    assert least == pytest.approx(min(loss_of(groups, each) for each in choices(groups)))
    assert fewest_bytes(groups, math.inf) == cheapest(groups)
    chosen = least_loss(groups, 10**6)
    assert chosen is not None
    assert loss_of(groups, chosen) == pytest.approx(least)


def test_bits_go_where_they_count() -> None:
    groups = {"a": {"int4": (4, 0.1), "int8": (8, 0.0)}, "b": {"int4": (4, 0.01), "int8": (8, 0.0)}}
    assert fewest_bytes(groups, 0.02) == {"a": "int8", "b": "int4"}
    assert least_loss(groups, 12) == {"a": "int8", "b": "int4"}
    assert fewest_bytes(groups, 0.001) == {"a": "int8", "b": "int8"}


@pytest.mark.parametrize(
    ("size", "nbytes"),
    [("3GiB", 3 * 2**30), ("500MB", 500 * 10**6), ("1.5 kib", 1536), (1000, 1000), ("1000", 1000), (" 2 B ", 2)],
)
def test_sizes(size: str | int, nbytes: int) -> None:
    assert bytes_named(size) == nbytes


@pytest.mark.parametrize("size", ["3GiBi", "GiB", "", "-1GiB", "3 Gigabytes", "0", 0, -5, "nan", "1e9", "3,5GiB"])
def test_what_is_no_size(size: str | int) -> None:
    with pytest.raises(FewbitsError, match="is no size; write bytes, or a number and a unit, such as 3GiB or 500MB"):
        Contract.of(None, size)


@pytest.mark.parametrize("max_kl", [0.0, -0.1, math.nan, math.inf])
def test_what_is_no_loss(max_kl: float) -> None:
    with pytest.raises(FewbitsError, match=r"max_kl is .*: a positive number of nats per token is needed"):
        Contract.of(max_kl, None)


def test_contracts() -> None:
    assert Contract.of(None, None) is None
    assert str(Contract.of(0.01, "1KiB")) == "max_kl 0.01 and max_size 1,024 bytes"
    assert str(Contract.of(0.5, None)) == "max_kl 0.5"


@pytest.mark.parametrize(
    ("to", "message"),
    [
        ("int9", "precision 'int9' is unknown"),
        ("int4,bf16", "to: bf16 is a cast; a contract chooses among int8, int8-weight"),
        ("int4,nf4", "to: nf4 cannot be written in this layout"),
        ("int4, int4", "to: int4 is named twice"),
        ("", "precision '' is unknown"),
    ],
)
def test_bad_sets(to: str, message: str) -> None:
    with pytest.raises(FewbitsError, match=message):
        allowed_precisions(to, WRITES)


def test_sets() -> None:
    assert [each.name for each in allowed_precisions(None, WRITES)] == [*WRITES]
    assert [each.name for each in allowed_precisions("int8, int4", WRITES)] == ["int8", "int4"]


@pytest.mark.parametrize(
    ("max_kl", "kept", "why"),
    [
        (0.02, ["int4", "int8"], {"fp8": "int8 loses", "int8-weight": "int8 loses little", "mxfp4": "int4 loses"}),
        (0.004, ["int4", "int8", "int8-weight"], {"fp8": "int8 loses less", "mxfp4": "int4 loses less"}),
        (None, ["int4", "int8", "int8-weight"], {"fp8": "int8 loses less", "mxfp4": "int4 loses less"}),
    ],
)  # fmt: skip
def test_what_is_worth_trying(max_kl: float | None, kept: list[str], why: dict[str, Any]) -> None:
    uniform = {"int8": 0.003, "int8-weight": 0.001, "int4": 0.06, "mxfp4": 0.3, "fp8": 0.03}
    nbytes = {"int8": 803, "int8-weight": 825, "int4": 425, "mxfp4": 425, "fp8": 803}
    found, left_out = worth_trying(uniform, nbytes, max_kl)
    assert found == kept
    assert left_out.keys() == why.keys()
    assert all(left_out[name].startswith(start) for name, start in why.items())
