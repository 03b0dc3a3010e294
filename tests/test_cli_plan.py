"""`fewbits plan`: the table, the next command, JSON, exit codes."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from fewbits.measure import plan_memory
from fewbits.measure.machine import this_machine
from fewbits.models.precision import PRECISIONS


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan_memory, "_PROBE_SECONDS", 0.0)
    monkeypatch.setattr(plan_memory, "_PROBE_BYTES", 1 << 20)


def test_it_shows_every_precision_and_what_to_run(run_cli: Callable, tiny: Path, tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    ran = run_cli("plan", tiny, "--memory", "1GiB", "--json", path)
    assert (ran.code, ran.err) == (0, "")
    first = [line.split()[0] for line in ran.out.splitlines() if line.strip()]
    assert [word for word in first if word in PRECISIONS] == list(PRECISIONS)
    assert "1.00 GiB as given, read at" in ran.out
    assert "next: fewbits convert" in ran.out
    assert "Larger models lose less" in ran.out
    data = json.loads(path.read_text())
    assert data["best"] in ("int8", "int8-weight")  # of a tiny model, either is the smaller one
    assert data["context"] == data["context_limit"]  # less than 4096


def test_it_fits_80_columns(run_cli: Callable, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    out = run_cli("plan", tiny, "--memory", "1GiB", "--train").out
    assert "…" not in out
    assert max(map(len, out.splitlines())) <= 80


def test_training_is_planned_where_it_is_asked_for(run_cli: Callable, tiny: Path) -> None:
    without, with_training = (run_cli("plan", tiny, "--memory", "1GiB", *more) for more in ((), ("--train",)))
    assert "to train:" not in without.out
    assert "to train: fewbits train" in with_training.out
    assert "16.00" in with_training.out


def test_nothing_fits(run_cli: Callable, tiny: Path) -> None:
    ran = run_cli("plan", tiny, "--memory", "10KiB")
    assert ran.code == 1
    assert "no precision fits in 0.00 GiB; the smallest, " in ran.err
    assert ran.err.startswith("error: ")
    assert ran.err.count("\n") == 1
    assert "next:" not in ran.out


def test_training_that_does_not_fit(run_cli: Callable, tiny: Path) -> None:
    room = json_of(run_cli, tiny, "1GiB")["rows"][3]["total"] + 1
    assert run_cli("plan", tiny, "--memory", room, "--context", 64).code == 0
    ran = run_cli("plan", tiny, "--memory", room, "--context", 64, "--train")
    assert ran.code == 1
    assert "no way of training fits" in ran.err


def json_of(run_cli: Callable, model: Path, memory: str) -> dict:
    path = model.parent / "plan.json"
    run_cli("plan", model, "--memory", memory, "--context", 64, "--json", path)
    return json.loads(path.read_text())


def test_a_context_beyond_the_limit_is_noted(run_cli: Callable, tiny: Path) -> None:
    ran = run_cli("plan", tiny, "--memory", "1GiB", "--context", 1_000_000)
    assert "note: a context of 1,000,000 is beyond the model's own limit" in " ".join(ran.out.split())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--memory", "lots"), "memory: 'lots' is no size"),
        (("--batch", "0"), "batch is 0"),
        (("--context", "-5"), "context is -5"),
        (("--json", "nowhere/plan.json"), "the folder nowhere does not exist"),
    ],
)
def test_bad_options_are_refused(run_cli: Callable, tiny: Path, arguments: tuple, message: str) -> None:
    ran = run_cli("plan", tiny, *arguments)
    assert (ran.code, ran.out) == (2, "")
    assert message in ran.err


def test_no_such_model(run_cli: Callable, tmp_path: Path) -> None:
    ran = run_cli("plan", tmp_path / "nowhere")
    assert (ran.code, ran.out) == (2, "")
    assert "no such file or folder" in ran.err


def test_a_machine_that_does_not_tell(run_cli: Callable, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    silent = replace(this_machine(), available_bytes=0, gpus=())
    monkeypatch.setattr(plan_memory, "this_machine", lambda: silent)
    ran = run_cli("plan", tiny)
    assert ran.code == 2
    assert "give --memory" in ran.err
