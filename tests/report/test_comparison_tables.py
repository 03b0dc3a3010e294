"""What a comparison says beyond its first table, which test_terminal.py has."""

from dataclasses import replace

import pytest
from test_terminal import COMPARISON, FP32, INT8, shown

from fewbits.measure.comparison import Comparison, Layer, Worst
from fewbits.report.comparison_tables import comparison_table

WORST = Worst(
    window=1,
    position=7,
    kl=4.087,
    context="a line\nbreak and a \x1b[31mcolour",
    following="ive",
    reference=(("ive", 0.463), ("ier", 0.306), ("ie", 0.04)),
    candidate=(("ier", 0.143), ("\n", 0.102)),
)
FULL = replace(
    INT8,
    top1_stderr=0.004,
    perplexity_stderr=1.2,
    peak_bytes=200 << 20,
    layers=(
        Layer("lm_head", "bf16", 16.0, None),
        Layer("a.q_proj", "int8", 8.03, 41.0),
        Layer("b", "int8", 8.0, 28.96),
    ),
    worst=(WORST, replace(WORST, kl=1.0)),
)


@pytest.fixture
def full() -> Comparison:
    return replace(COMPARISON, rows=(FP32, FULL), notes=("The reference makes no sense of this text.",))


def test_errors_memory_and_the_weakest_layer(full: Comparison) -> None:
    lines = [line.split() for line in shown(comparison_table(full))]
    assert ["fp32", "100.0", "±nan", "16.634", "±nan", "-", "-"] in lines
    assert ["model-int8", "90.4", "±0.4", "17.031", "±1", "200.0", "29.0", "b", "(int8)"] in lines


def test_the_worst_place_in_words_that_no_terminal_obeys(full: Comparison) -> None:
    text = " ".join(" ".join(shown(comparison_table(full))).split())
    assert 'model-int8: KL 4.09 after "…a line break and a \\u001b[31mcolour", where "ive" follows:' in text
    assert 'fp32 "ive" 46%, "ier" 31%; model-int8 "ier" 14%, "\\n" 10%' in text
    assert "KL 1.00" not in text
    assert "\x1b" not in text


def test_notes_are_shown(full: Comparison) -> None:
    assert "Note: The reference makes no sense of this text." in shown(comparison_table(full))


def test_the_heading_names_what_all_are_held_against(full: Comparison) -> None:
    assert any("KL to int8" in line for line in shown(comparison_table(replace(full, rows=(FULL,)))))


def test_what_was_not_measured_has_no_table() -> None:
    lines = shown(comparison_table(COMPARISON))
    assert not any("weakest" in line or "differ most" in line or "Note" in line for line in lines)
