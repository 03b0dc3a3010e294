import json
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from fewbits import FewbitsError
from fewbits.cli import app
from fewbits.formats import names
from fewbits.report.number import number_table


def run(*args):
    result = CliRunner().invoke(app, args, env={"COLUMNS": "80", "NO_COLOR": "1"}, catch_exceptions=False)
    assert result.exit_code == 0
    assert all(len(line) <= 80 for line in result.output.splitlines())
    assert "…" not in result.output
    return result.output


def test_the_table_has_every_format():
    rows = {line.split()[0]: line.split() for line in reversed(run("formats").splitlines()) if line.strip()}
    assert set(names()) <= set(rows)
    assert rows["fp16"] == ["fp16", "16", "1/5/10", "65504", "2^-14", "2^-24", "2^-10", "2"]
    assert rows["fp64"][3] == "1.7977e+308"
    assert rows["int8"][:4] == ["int8", "8", "1/0/7", "127"]


@pytest.mark.parametrize("name", names())
def test_each_format_has_a_page(name):
    page = run("formats", name)
    assert name in page
    assert "└" in page


def test_one_format_is_drawn():
    page = run("formats", "half")
    for expected in (
        "S EEEEE MMMMMMMMMM",
        "└ exponent, 5 bits, bias 15",
        "65504  0 11110 1111111111  0x7BFF",
        "2^-14 = 6.1035e-05",
        "0x7C00, 0xFC00",
        "0x7C01–0x7FFF, 0xFC01–0xFFFF; fewbits writes 0x7E00",
    ):
        assert expected in page


def test_one_number_in_three_formats():
    shown = run("show", "0.1", "--in", "fp16,bf16,e4m3fn")
    for expected in (
        "0 01011 1001100110",
        "0.0999755859375",
        "-2.4414e-05  -0.4 ULP",
        "0x3DCD",
        "0.1015625",
        "0.09375",
    ):
        assert expected in shown


def test_a_double_is_shown_whole():
    shown = run("show", "0.1", "--in", "fp64")
    assert "0 01111111011 1001100110011001100110011001100110011001100110011010" in shown
    assert "0.1000000000000000055511151231257827021181583404541015625" in shown


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        (("1e9", "--in", "fp16"), "overflow: beyond the largest value, 65504"),
        (("1e9", "--in", "e4m3fn"), "saturated at 448"),
        (("0.1", "--in", "int8"), "underflow to zero"),
        (("-1.5", "--in", "fp16"), "1 01111 1000000000"),
        (("-0", "--in", "fp16"), "-0.0"),
        (("nan", "--in", "fp16"), "0x7E00"),
        (("0x3C00", "--in", "fp16,bf16"), "read as a code of fp16: 1"),
        (("1.0001", "--in", "fp16", "--rounding", "up"), "0 01111 0000000001"),
        (("5e-324", "--in", "fp64"), "4.9407e-324 = 1 × 2^-1074"),
    ],
)
def test_show(args, expected):
    assert expected in run("show", *args)


def test_stochastic_shows_the_two_outcomes():
    shown = run("show", "0.1", "--in", "bf16", "--rounding", "stochastic")
    assert "0.099609375" in shown
    assert "0.10009765625" in shown


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("0.1", ["fp61"]), "unknown format 'fp61': did you mean"),
        (("zero", ["fp16"]), "'zero' is not a number"),
        (("1", ["fp16"], "round"), "unknown rounding 'round'"),
    ],
)
def test_messages(args, message):
    with pytest.raises(FewbitsError, match=message):
        number_table(*args)


@pytest.mark.parametrize("args", [["formats"], ["show", "0.1"]])
def test_no_torch_is_imported(args):
    code = f"import sys; from fewbits.cli import app; app({args}, standalone_mode=False); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "False"


def test_dialects_show_where_they_differ():
    page = run("formats", "e4m3fn", "--dialects")
    rows = {line.split()[0]: line.split()[1:3] for line in page.splitlines() if line[1:2].isalpha()}
    assert rows["cuda"] == ["448", "448"]
    assert rows["ml_dtypes"] == ["nan", "nan"]
    assert "fewbits: saturate" in page


def test_dialects_need_a_format():
    result = CliRunner().invoke(app, ["formats", "--dialects"])
    assert isinstance(result.exception, FewbitsError)
    assert "--dialects is about one format" in str(result.exception)


def test_block_formats_see_a_block_of_one():
    shown = run("show", "0.1", "--in", "mxfp4")
    assert "0.015625  0x79 in e8m0fnu" in shown
    assert "saturated at 0.09375" in shown
    assert "nan  0xFF in e8m0fnu" in run("show", "inf", "--in", "mxfp4")


def test_json(tmp_path):
    run("formats", "--json", str(tmp_path / "formats.json"))
    rows = {row["name"]: row for row in json.loads((tmp_path / "formats.json").read_text())["formats"]}
    assert rows["fp16"]["max"] == 65504
    assert rows["mxfp4"]["block"] == {"size": 32, "scale": "e8m0fnu", "tensor_scale": None}
    run("show", "0.1", "--in", "fp16", "--json", str(tmp_path / "number.json"))
    shown = json.loads((tmp_path / "number.json").read_text())
    assert shown["number"] == "1/10"
    assert shown["formats"][0]["code"] == 0x2E66
    assert shown["formats"][0]["becomes"] == "0.0999755859375"
