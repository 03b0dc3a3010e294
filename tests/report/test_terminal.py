import io
import subprocess
import sys
from dataclasses import dataclass, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console, RenderableType

from fewbits.measure.comparison import Comparison, Row
from fewbits.measure.machine import Gpu, Machine
from fewbits.report.comparison_tables import comparison_table
from fewbits.report.grouping import group_rows, number_set
from fewbits.report.terminal import human_bytes, machine_table, manifest_table

MACHINE = Machine(
    versions={"python": "3.12.1", "fewbits": "0.1.0", "torch": "2.13.0"},
    system="Linux 6.18 x86_64",
    cpu="AMD EPYC",
    cores=2,
    threads=2,
    memory_bytes=24 << 30,
    available_bytes=20 << 30,
    gpus=(),
    isa="avx512",
    isa_reason="the widest this CPU has",
)
FP32 = Row("model.gguf", "fp32", 538 << 20, 538 << 20, 32.0, 0.0, 0.0, 1.0, 16.634, 546.2, 15.04)
BF16 = Row("model.gguf", "bf16", 269 << 20, 269 << 20, 16.0, 0.00117, 0.000021, 0.9744, 16.631, 1012.4, 21.1)
INT8 = Row("model-int8", "int8", 155 << 20, 182 << 20, 8.03, 0.0282, 0.0011, 0.9044, 17.031, 1212.3, 81.06)
COMPARISON = Comparison(
    rows=(FP32, BF16, INT8),
    reference="model.gguf",
    reference_bytes=98_362_432,
    text="Python 3.12.1 help topics",
    windows=8,
    window_tokens=512,
    prompt_tokens=512,
    new_tokens=32,
    speed_repeats=3,
    date="2026-11-24T03:22:18+00:00",
    machine=MACHINE,
)


@dataclass
class Kept:
    """A row of a manifest."""

    module: str
    shape: tuple[int, ...] = (4, 4)
    format: str = "int8"
    nbytes: int = 16
    reason: str | None = None


def shown(renderable: RenderableType, width: int = 80) -> list[str]:
    """The lines on a terminal that knows no colour."""
    console = Console(file=io.StringIO(), width=width, color_system=None)
    console.print(renderable)
    lines = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    assert all(len(line) <= width for line in lines)
    return [line.rstrip() for line in lines]


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (None, "-"),
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.00 KiB"),
        (98_362_432, "93.8 MiB"),
        (999 * 1024, "999 KiB"),
        (1000 * 1024, "0.98 MiB"),
        (10_234, "9.99 KiB"),
        (10_239, "10.0 KiB"),
        (2_308_000_000, "2.15 GiB"),
        (5 * 1024**6, "5120 PiB"),
    ],
)
def test_human_bytes(count: int | None, text: str) -> None:
    assert human_bytes(count) == text


@given(st.integers(0, 1 << 59))
def test_human_bytes_is_within_half_a_unit_of_the_third_digit(count: int) -> None:
    number, unit = human_bytes(count).split()
    value = float(number) * 1024 ** ["B", "KiB", "MiB", "GiB", "TiB", "PiB"].index(unit)
    assert abs(value - count) <= 0.00513 * count  # 0.005 / 0.976, the smallest number that is shown
    assert len(number) <= 4


def test_comparison_has_a_line_for_each_model_in_80_columns() -> None:
    lines = shown(comparison_table(COMPARISON))
    assert [line.split() for line in lines[3:6]] == [
        ["fp32", "538.0", "538.0", "32.00", "0.0000", "100.0", "16.634", "546", "15.0"],
        ["bf16", "269.0", "269.0", "16.00", "0.0012", "±2e-05", "97.4", "16.631", "1,012", "21.1"],
        ["model-int8", "155.0", "182.0", "8.03", "0.0282", "±0.001", "90.4", "17.031", "1,212", "81.1"],
    ]
    assert len({len(line) for line in lines[3:6]}) == 1  # right-aligned


def test_comparison_says_what_it_was_measured_on() -> None:
    caption = "\n".join(shown(comparison_table(COMPARISON))[6:])
    assert "Reference: model.gguf (93.8 MiB on disk)." in caption
    assert "Text: Python 3.12.1 help topics, 8 × 512 tokens." in caption
    assert "a prompt of 512 tokens, then 32 one at a time; best of 3." in caption
    assert "AMD EPYC, 2 threads, avx512; torch 2.13.0; 2026-11-24" in caption


def test_comparison_shows_what_is_absent_or_not_finite() -> None:
    row = replace(
        INT8, disk_bytes=None, bits_per_weight=None, kl=float("nan"), kl_stderr=float("nan"), prefill_tps=None,
        decode_tps=None, perplexity=float("inf"),
    )  # fmt: skip
    comparison = replace(COMPARISON, rows=(row,), reference_bytes=None, prompt_tokens=None, new_tokens=None)
    lines = shown(comparison_table(comparison))
    assert lines[3].split() == ["model-int8", "-", "182.0", "-", "nan", "±nan", "90.4", "inf", "-", "-"]
    assert not any("Speed:" in line for line in lines)


def test_comparison_of_large_models_is_in_gibibytes() -> None:
    row = replace(FP32, disk_bytes=28 << 30, memory_bytes=28 << 30)
    lines = shown(comparison_table(replace(COMPARISON, rows=(row,))))
    assert "GiB" in lines[1]
    assert lines[3].split()[1] == "28.0"


def test_a_candidates_precision_is_shown_where_its_name_does_not_say_it() -> None:
    row = replace(INT8, name="mine")
    assert "mine (int8)" in shown(comparison_table(replace(COMPARISON, rows=(row,))), width=100)[3]


def test_long_names_are_folded_and_numbers_stay() -> None:
    row = replace(INT8, name="a-very-long-name-of-a-converted-model-int8")
    lines = shown(comparison_table(replace(COMPARISON, rows=(row,))))
    assert "81.1" in lines[3]
    assert "17.031" in lines[3]


def test_manifest_groups_equal_layers_and_adds_their_bytes() -> None:
    rows = [Kept(f"model.layers.{layer}.mlp.{name}") for layer in range(30) for name in ("up_proj", "down_proj")]
    rows.append(Kept("model.norm", (4,), "bf16", 8, "LlamaRMSNorm, not a linear layer"))
    lines = shown(manifest_table(rows))
    assert [line.split() for line in lines[2:]] == [
        ["model.layers.{0..29}.mlp.up_proj", "30", "4×4", "int8", "480", "B"],
        ["model.layers.{0..29}.mlp.down_proj", "30", "4×4", "int8", "480", "B"],
        ["model.norm", "1", "4", "bf16", "8", "B"],
        ["kept:", "LlamaRMSNorm,", "not", "a", "linear", "layer"],
        ["61", "tensors,", "968", "B:", "960", "B", "in", "int8,", "8", "B", "in", "bf16"],
    ]


def test_brackets_in_names_and_reasons_are_text() -> None:
    lines = shown(manifest_table([Kept("a[0]", reason="kept by '[red]*'")]))
    assert lines[2].startswith("a[0]")
    assert lines[3] == "  kept: kept by '[red]*'"


def test_an_empty_manifest() -> None:
    assert shown(manifest_table([]))[-1] == "no tensors"


def test_layers_that_differ_are_apart() -> None:
    rows = [Kept("l.0.w"), Kept("l.1.w", format="bf16", reason="kept"), Kept("l.2.w"), Kept("l.3.w", shape=(2, 8))]
    assert [name for name, _ in group_rows(rows)] == ["l.{0,2}.w", "l.1.w", "l.3.w"]


def test_experts_in_every_layer_are_one_group() -> None:
    rows = [Kept(f"layers.{layer}.experts.{expert}.w") for layer in range(3) for expert in range(4)]
    assert [name for name, _ in group_rows(rows)] == ["layers.{0..2}.experts.{0..3}.w"]


def test_a_name_stands_for_no_layer_that_is_not_there() -> None:
    rows = [Kept(f"layers.{layer}.experts.{expert}.w") for layer, expert in [(0, 0), (0, 1), (1, 1)]]
    assert [name for name, _ in group_rows(rows)] == ["layers.0.experts.{0,1}.w", "layers.1.experts.1.w"]


def test_numbers_inside_a_word_are_part_of_it() -> None:
    assert [name for name, _ in group_rows([Kept("conv1.w"), Kept("conv2.w")])] == ["conv1.w", "conv2.w"]


@given(st.sets(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=1))
def test_groups_hold_every_row_once(pairs: set[tuple[int, int]]) -> None:
    rows = [Kept(f"a.{first}.b.{second}") for first, second in sorted(pairs)]
    grouped = [row.module for _, members in group_rows(rows) for row in members]
    assert sorted(grouped) == sorted(row.module for row in rows)


@pytest.mark.parametrize(
    ("numbers", "text"),
    [([7], "7"), ([0, 1], "{0,1}"), ([0, 1, 2], "{0..2}"), ([0, 2, 5, 6, 7, 9], "{0,2,5..7,9}")],
)
def test_number_set(numbers: list[int], text: str) -> None:
    assert number_set(numbers) == text


def test_machine() -> None:
    lines = shown(machine_table(MACHINE))
    assert "memory   24.0 GiB, 20.0 GiB available" in lines
    assert "GPU      none that PyTorch can use" in lines
    assert "kernels  avx512 (the widest this CPU has)" in lines


def test_machine_with_gpus() -> None:
    lines = shown(machine_table(replace(MACHINE, gpus=(Gpu("H100", 80 << 30, "9.0"),) * 2)))
    assert lines.count("GPU      H100, 80.0 GiB, compute capability 9.0") == 2


def test_reports_come_without_torch() -> None:
    check = "import sys, fewbits.report.terminal; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", check], check=False).returncode == 0
