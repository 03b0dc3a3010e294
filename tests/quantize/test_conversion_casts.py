"""What a conversion says about its casts, and what it does where they overflow."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import fewbits
from fewbits.errors import OverflowWarning
from fewbits.tensors.cast_report import CastReport, cast_and_report

WEIGHTS = "model.safetensors"
NORM, QUERY = "model.norm.weight", "model.layers.1.self_attn.q_proj.weight"


@pytest.fixture(scope="module")
def overflowing(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with weights beyond fp16 in two tensors, as T5's can be."""
    folder = shutil.copytree(tiny, tmp_path_factory.mktemp("overflowing") / "model")
    tensors = load_file(folder / WEIGHTS)
    tensors[NORM][5] = 1e5
    tensors[QUERY][3, :4] = -7e4
    save_file(tensors, folder / WEIGHTS)
    return folder


@pytest.mark.parametrize("to", ["fp16", "bf16", "fp32"])
def test_every_tensor_is_reported(save_tiny: Callable, tmp_path: Path, to: str) -> None:
    model = save_tiny(tmp_path / "model", dtype=torch.float32)
    done = fewbits.convert(tmp_path / "model", tmp_path / "out", to)
    original = load_file(tmp_path / "model" / WEIGHTS)
    written = load_file(tmp_path / "out" / WEIGHTS)
    assert [cast.tensor for cast in done.casts] == [row.tensor for row in done.manifest]
    assert sum(cast.values for cast in done.casts) == sum(value.numel() for value in model.state_dict().values())
    for cast in done.casts:
        values, expected = cast_and_report(cast.tensor, original[cast.tensor], to)
        assert cast == expected
        assert torch.equal(written[cast.tensor], values)
        assert cast.max_abs_error == (written[cast.tensor].double() - original[cast.tensor].double()).abs().max()
    assert any(cast.max_abs_error for cast in done.casts) == (to != "fp32")


def test_the_report_is_in_the_folder(tiny: Path, tmp_path: Path) -> None:
    done = fewbits.convert(tiny, tmp_path / "out", "fp16")
    stored = json.loads((tmp_path / "out/fewbits.json").read_text())["casts"]
    assert tuple(CastReport(**cast) for cast in stored) == done.casts
    assert sum(cast.subnormal for cast in done.casts) > 0  # of bf16's random weights, some are tiny


def test_quantization_casts_nothing(tiny: Path, tmp_path: Path) -> None:
    assert fewbits.convert(tiny, tmp_path / "out", "int8").casts == ()
    assert json.loads((tmp_path / "out/fewbits.json").read_text())["casts"] == []


def test_float64_is_rounded_once(tiny: Path, tmp_path: Path) -> None:
    model = shutil.copytree(tiny, tmp_path / "model")
    tensors = load_file(model / WEIGHTS)
    tensors[NORM] = tensors[NORM].double()
    tensors[NORM][0] = 1 + 2.0**-8 + 2.0**-40  # the float32 nearest to it is a tie of bf16
    save_file(tensors, model / WEIGHTS)
    fewbits.convert(model, tmp_path / "out", "bf16")
    assert load_file(tmp_path / "out" / WEIGHTS)[NORM][0] == 1 + 2.0**-7


def test_a_model_that_overflows_is_written_with_a_loud_warning(overflowing: Path, tmp_path: Path) -> None:
    with pytest.warns(OverflowWarning) as told:
        fewbits.convert(overflowing, tmp_path / "out", "fp16")
    assert len(told) == 1
    message = str(told[0].message)
    assert "5 values are beyond fp16, whose largest number is 65504, and became Inf: the model may not work" in message
    assert "use bf16 or fp32, or overflow saturate" in message
    assert f"{NORM} (1)" in message
    assert f"{QUERY} (4)" in message
    assert load_file(tmp_path / "out" / WEIGHTS)[NORM][5] == float("inf")


@pytest.mark.parametrize(("overflow", "became"), [("saturate", 65504.0), ("ieee", float("inf"))])
def test_overflow_that_was_allowed_is_counted(overflowing: Path, tmp_path: Path, overflow: str, became: float) -> None:
    with pytest.warns(OverflowWarning, match=f"became {'Inf' if overflow == 'ieee' else 'its largest number'}"):
        done = fewbits.convert(overflowing, tmp_path / "out", "fp16", overflow=overflow)
    assert {cast.tensor: cast.overflowed for cast in done.casts if cast.overflowed} == {NORM: 1, QUERY: 4}
    written = load_file(tmp_path / "out" / WEIGHTS)
    assert written[NORM][5] == became
    assert (written[QUERY][3, :4] == -became).all()


@pytest.mark.parametrize(
    ("to", "overflow", "message"),
    [
        ("fp16", "wrap", "'wrap'"),
        ("int8", "saturate", "overflow='saturate' is of casts, and int8 has scales: leave it out"),
    ],
)
def test_wrong_overflow_rules(tiny: Path, tmp_path: Path, to: str, overflow: str, message: str) -> None:
    with pytest.raises(fewbits.FewbitsError, match=message):
        fewbits.convert(tiny, tmp_path / "out", to, overflow=overflow)


def test_the_command_shows_the_report_and_warns_on_stderr(run_cli: Callable, overflowing: Path, tmp_path: Path) -> None:
    options = ["--to", "fp16", "--overflow", "saturate", "--json", tmp_path / "done.json"]
    ran = run_cli("convert", overflowing, tmp_path / "out", *options)
    assert ran.code == 0
    assert ran.err.startswith("WARNING: 5 values are beyond fp16")
    assert ran.err.count("\n") == 1
    assert f"{NORM} (1)" in ran.err
    assert f"{QUERY} (4)" in ran.err
    assert "5 overflowed" in ran.out
    casts = json.loads((tmp_path / "done.json").read_text())["casts"]
    assert {cast["tensor"] for cast in casts if cast["overflowed"]} == {NORM, QUERY}


def test_the_command_warns_unasked(run_cli: Callable, overflowing: Path, tmp_path: Path) -> None:
    ran = run_cli("convert", overflowing, tmp_path / "out", "--to", "fp16")
    assert ran.code == 0
    assert ran.err.startswith("WARNING: 5 values are beyond fp16")
    assert "became Inf" in ran.err
    assert (tmp_path / "out").exists()


@pytest.mark.parametrize("to", ["fp32", "int8"])
@pytest.mark.parametrize("bad", [float("nan"), -float("inf")])
def test_what_is_not_finite_is_refused_by_name_unless_allowed(tiny: Path, tmp_path: Path, to: str, bad: float) -> None:
    model = shutil.copytree(tiny, tmp_path / "model")
    tensors = load_file(model / WEIGHTS)
    tensors[NORM][[2, 7]] = bad
    save_file(tensors, model / WEIGHTS)
    with pytest.raises(fewbits.FewbitsError, match=rf"{NORM}: 2 of 64 values are NaN or Inf.*--allow-nonfinite"):
        fewbits.convert(model, tmp_path / "out", to)
    assert list(tmp_path.iterdir()) == [model]
    fewbits.convert(model, tmp_path / "out", to, allow_nonfinite=True)
    assert not load_file(tmp_path / "out" / WEIGHTS)[NORM][[2, 7]].isfinite().any()


def test_the_command_says_nothing_where_nothing_overflows(run_cli: Callable, tiny: Path, tmp_path: Path) -> None:
    ran = run_cli("convert", tiny, tmp_path / "out", "--to", "fp32")
    assert (ran.code, ran.err) == (0, "")
    assert "all kept exactly" in ran.out
