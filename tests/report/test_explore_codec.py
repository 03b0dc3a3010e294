"""The page's codec against exact.py: every code of every format up to 16 bits, every rounding on a sample."""

import itertools
import json
import math
import random
import shutil
import subprocess
from dataclasses import asdict
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest

from fewbits import FewbitsError
from fewbits.formats import Format, Kind, Overflow, Rounding, by_name, exact, exact_block, literal, names
from fewbits.report.explore import GROUPS, page_data

HARNESS = Path(__file__).parent / "page/harness.js"
NODE = shutil.which("node")
pytestmark = pytest.mark.skipif(NODE is None, reason="node is not installed: the page's JavaScript is not run here")

CATALOG = [fmt for fmt in map(Format.named, names()) if fmt.block is None]
BY_NAME = [Format.named(n) for n in ("e5m3", "e3m3fn", "e4m3b11fnuz", "e2m3b0", "e1m6fn", "e8m7fnuz", "e6m9", "e1m1fn")]
NARROW = [fmt for fmt in (*CATALOG, *BY_NAME) if fmt.bits <= 16]


def run_page(*jobs: dict[str, Any]) -> list[Any]:
    """What the page's JavaScript makes of each job."""
    assert NODE is not None
    done = subprocess.run([NODE, HARNESS], input=json.dumps(jobs), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def row(fmt: Format) -> dict[str, Any]:
    return asdict(fmt) | {"kind": str(fmt.kind), "specials": str(fmt.specials)}


def text(value: exact.Exact | None) -> str | None:
    if value is None:
        return None
    if isinstance(value, float):
        return f"{value:g}"
    return f"{value.numerator}/{value.denominator}"


def numbers(fmt: Format) -> list[exact.Exact]:
    """Ties and what lies next to them, around small, middling and the largest values; specials; some at random."""
    chosen: list[exact.Exact] = [0.0, -0.0, math.inf, -math.inf, math.nan, Fraction(1, 3), Fraction(-1, 3)]
    draw = random.Random(fmt.name)
    if fmt.kind is Kind.CODEBOOK:
        levels = [Fraction(level) for level in fmt.codebook]
        middles = [(a + b) / 2 for a, b in itertools.pairwise(levels)]
        return [*chosen, *levels, *middles, Fraction(-5), Fraction(7, 3)]
    codes = {0, 1, 2, 3, fmt.sign_bit // 2, fmt.max_code - 1, fmt.max_code, fmt.max_code + 1}
    codes |= {draw.randrange(fmt.sign_bit) for _ in range(2)}
    for code in sorted(codes):
        low, high = fmt.magnitude(code), fmt.magnitude(code + 1)
        middle, little = (low + high) / 2, (high - low) / 1000
        for value in (low, middle - little, middle, middle + little, low + (high - low) * Fraction(draw.random())):
            chosen += [value, -value]
    return [*chosen, fmt.magnitude(fmt.max_code) * 3, -fmt.magnitude(fmt.max_code) * 3]


def rules(fmt: Format) -> list[str | None]:
    return [None, *(str(rule) for rule in Overflow if rule is not Overflow.IEEE or fmt.has_inf or fmt.has_nan)]


def test_every_code_decodes_as_exactly() -> None:
    answers = run_page(*({"op": "decode", "row": row(fmt)} for fmt in NARROW))
    assert len(answers) == len(NARROW) > 25
    for fmt, values in zip(NARROW, answers, strict=True):
        assert values == [text(exact.decode(code, fmt)) for code in range(1 << fmt.bits)], fmt.name


def test_the_first_codes_of_wide_formats_decode_as_exactly() -> None:
    wide = [fmt for fmt in CATALOG if fmt.bits > 16]
    assert {fmt.name for fmt in wide} == {"fp64", "fp32", "tf32"}
    for fmt, values in zip(
        wide, run_page(*({"op": "decode", "row": row(fmt), "codes": 64} for fmt in wide)), strict=True
    ):
        assert values == [text(exact.decode(code, fmt)) for code in range(64)]


def test_every_rounding_and_overflow_encodes_as_exactly() -> None:
    draw = random.Random(0)
    jobs, expected = [], []
    for fmt in (*CATALOG, *BY_NAME):
        cases = []
        for value in numbers(fmt):
            for rounding in Rounding:
                for rule in rules(fmt):
                    word = draw.getrandbits(32) if rounding is Rounding.STOCHASTIC else None
                    cases.append([text(value), str(rounding), rule, word])
                    expected.append(str(exact.encode(value, fmt, rounding, rule, word)))
        jobs.append({"op": "encode", "row": row(fmt), "cases": cases})
    answers = [(job["row"]["name"], *case, code) for job, codes in zip(jobs, run_page(*jobs), strict=True)
               for case, code in zip(job["cases"], codes, strict=True)]  # fmt: skip
    wrong = [(*answer, right) for answer, right in zip(answers, expected, strict=True) if answer[-1] != right]
    assert len(answers) > 30_000
    assert wrong == []


def test_ulp_and_neighbours_are_exact() -> None:
    finite = {fmt: [v for v in numbers(fmt) if isinstance(v, Fraction) or v == 0] for fmt in (*CATALOG, *BY_NAME)}
    jobs = [{"op": "around", "row": row(fmt), "values": [text(v) for v in values]} for fmt, values in finite.items()]
    for (fmt, values), answer in zip(finite.items(), run_page(*jobs), strict=True):
        assert answer == [[text(exact.ulp(v, fmt)), *map(text, exact.neighbours(v, fmt))] for v in values], fmt.name


def test_what_is_derived_is_the_same() -> None:
    formats = (*CATALOG, *BY_NAME)
    for fmt, derived in zip(formats, run_page(*({"op": "derived", "row": row(fmt)} for fmt in formats)), strict=True):
        if fmt.bits <= 32:  # JSON's numbers are doubles
            assert [derived[key] for key in ("infCode", "nanCode", "maxCode")] == [
                fmt.inf_code,
                fmt.nan_code,
                fmt.max_code,
            ]
        keys = ("bits", "emin", "hasInf", "hasNan", "hasNegativeZero")
        assert [derived[key] for key in keys] == [
            fmt.bits, fmt.emin, fmt.has_inf, fmt.has_nan, fmt.has_negative_zero
        ]  # fmt: skip
        assert [derived["max"], derived["eps"]] == [text(Fraction(fmt.max)), text(Fraction(fmt.eps))], fmt.name


def test_names_are_read_as_by_name_does() -> None:
    wanted = ["e5m3", "e4m3fn", "e2m1fn", "e4m3b11fnuz", "e1m2fn", "e3m12", "fp16", "e5", "e0m3", "e1m3", "e9m7",
              "e12m4", "e2m0", "e4m3b2000", "e11m4fn", "e10m5b600"]  # fmt: skip
    for name, read in zip(wanted, run_page({"op": "by_name", "names": wanted})[0], strict=True):
        try:
            fmt = by_name.parse(name)
        except FewbitsError:
            assert read.startswith("error: "), name
        else:
            keys = set(row(fmt)) - {"section", "aliases", "codebook"} if fmt else set()
            assert (read is None) == (fmt is None), name
            assert {key: read[key] for key in keys} == {key: row(fmt)[key] for key in keys}


def test_numbers_are_read_as_literal_does() -> None:
    formats = [Format.named(name) for name in ("fp32", "fp16", "bf16", "e4m3fn", "e3m2fn")]
    texts = ["0.1", "-2.5e-3", "1/3", "-1/3", "inf", "-inf", "+Infinity", "nan", "-0", "0", "0x1.8p-3", "-0x.8p4",
             "1_000", "0x3C00", "bf16:0x3F80", "0b0011110000000000", "0x7F", "0b100000", "1e400", ".5", "5.", "1e-400",
             "0x3f800000", "", "hello", "1/0", "0x123", "1e99999", "0xp3", "--1", "1.2.3", "0b101", "fp16:0x12345",
             "e"]  # fmt: skip
    read = run_page({"op": "literal", "rows": [row(fmt) for fmt in formats], "texts": texts})[0]
    for written, answer in zip(texts, read, strict=True):
        try:
            value = literal.parse(written, formats)[0]
        except FewbitsError:
            assert answer.startswith("error: "), written
        else:
            assert answer == text(value), written


def test_doubles_are_exact_both_ways() -> None:
    draw = random.Random(1)
    values = [0.1, 1.0, -3.5, 5e-324, 2.0**-1022, 1.7976931348623157e308, 123456789.125]
    values += [math.ldexp(draw.uniform(-1, 1), draw.randrange(-1060, 1024)) for _ in range(200)]
    [answers] = run_page({"op": "doubles", "values": values})
    assert [(exactly, float(back)) for exactly, back in answers] == [(text(Fraction(v)), v) for v in values]


@pytest.mark.parametrize("name", [name for name in names() if Format.named(name).block is not None])
def test_blocks_are_stored_as_exactly(name: str) -> None:
    fmt = Format.named(name)
    assert fmt.block is not None
    draw = random.Random(name)
    tensors = [[Fraction(draw.gauss(0, 1)).limit_denominator(1 << 20) for _ in range(64)] for _ in range(6)]
    for power, values in enumerate(tensors):
        values[7] *= 10**power
        values[32:] = [Fraction(0)] * 32 if power == 5 else values[32:]
    for rule in page_data()["scale_rules"][name]:
        shared = {"op": "store", "element": row(fmt.element), "scale": row(Format.named(fmt.block.scale)), "rule": rule}
        tensor_row = row(Format.named(fmt.block.tensor_scale)) if fmt.block.tensor_scale else None
        shared |= {"tensor": tensor_row, "size": fmt.block.size}
        answers = run_page(*(shared | {"values": [text(v) for v in values]} for values in tensors))
        for values, blocks in zip(tensors, answers, strict=True):
            second = exact_block.tensor_scale(values) if rule == "two_level" else Fraction(1)
            cut = [values[at : at + fmt.block.size] for at in range(0, 64, fmt.block.size)]
            right = [exact_block.encode_block(part, fmt, rule, tensor=second) for part in cut]
            assert [(code, codes) for code, codes, _ in blocks] == right, rule


@pytest.mark.parametrize("group", GROUPS, ids=lambda group: group.name)
def test_integers_in_groups_are_stored_as_tensors_quantized_does(group: Any) -> None:
    torch = pytest.importorskip("torch")
    from fewbits.tensors.quantized import quantize_weight, values_of

    torch.manual_seed(0)
    weight = torch.randn(8, 64).bfloat16().float()
    weight[3, 5] *= 40
    stored = quantize_weight(weight, group.name, group_size=group.size, scale_dtype=torch.bfloat16)
    job = {"op": "store", "element": row(Format.named(group.name)), "scale": row(Format.named(group.scale))}
    job |= {"size": group.size, "divisor": group.divisor, "lowest": group.lowest, "tensor": None}
    job["values"] = [text(Fraction(value)) for value in weight.reshape(-1).tolist()]
    [blocks] = run_page(job)
    values = values_of(stored.codes, group.name) * stored.scales.float().repeat_interleave(group.size, 1)
    assert [v for _, _, part in blocks for v in part] == [text(Fraction(v)) for v in values.reshape(-1).tolist()]
