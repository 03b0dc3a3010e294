import io

from rich.console import Console

from fewbits.report.terminal import cast_table
from fewbits.tensors.cast_report import CastReport


def shown(casts, width=80, color_system=None):
    console = Console(file=io.StringIO(), width=width, color_system=color_system, force_terminal=bool(color_system))
    console.print(cast_table(casts))
    lines = console.file.getvalue().splitlines()
    assert color_system or all(len(line) <= width for line in lines)
    return [line.rstrip() for line in lines]


def test_equal_layers_share_a_line_with_their_sums_and_largest_errors():
    casts = [CastReport(f"l.{layer}.w.weight", 1000, layer, 2, 3, 0.5 * layer, 0.1) for layer in range(3)]
    lines = shown([*casts, CastReport("norm.weight", 10, max_abs_error=0.01, max_rel_error=0.001)])
    assert lines[3].split() == ["l.{0..2}.w", "3,000", "3", "6", "9", "1", "0.1"]
    assert " ".join(lines[4:]) == (
        "4 tensors, 3,010 values: 3 overflowed, 6 became subnormal, 9 became zero; largest error 1 (l.2.w.weight), "
        "relative 0.1"
    )


def test_layers_with_nothing_to_say_are_left_out_of_the_name():
    casts = [CastReport(f"l.{layer}.w", 9, subnormal=layer % 2, max_abs_error=1e-9) for layer in range(5)]
    assert shown(casts)[3].split() == ["l.{1,3}.w", "18", "-", "2", "-", "1e-09", "0"]


def test_a_cast_into_the_normal_range_is_a_line():
    lines = shown([CastReport("a", 5, max_abs_error=0.25, max_rel_error=0.004), CastReport("b", 6)])
    assert " ".join(lines) == "2 tensors, 11 values: all in the normal range; largest error 0.25 (a), relative 0.004"


def test_exact_casts_and_none():
    assert shown([CastReport("a", 5)]) == ["1 tensors, 5 values: all kept exactly"]
    assert shown([]) == ["0 tensors, 0 values: all kept exactly"]


def test_overflow_alone_is_not_exact():
    assert "1 overflowed" in shown([CastReport("a", 5, overflowed=1)])[-1]


def test_only_overflow_is_red():
    lines = shown([CastReport("a", 5, overflowed=1), CastReport("b", 5, zeroed=1)], color_system="standard")
    assert "\x1b[1;31m" in lines[3]
    assert "\x1b[1;31m" not in lines[4]


def test_large_counts_and_brackets_fit():
    cast = CastReport("model[0].decoder.a_long_name_of_a_layer", 10**9, 10**8, 10**8, 10**8, 1.23456e-12, 0.98765)
    text = "\n".join(shown([cast]))
    assert "model[0]" in text
    assert "1,000,000,000" in text
    assert "1.2e-12" in text
