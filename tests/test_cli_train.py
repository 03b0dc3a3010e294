"""`fewbits train`: what it prints and writes, Ctrl-C and --resume, and its exit codes."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import fewbits
from fewbits.measure.training import TrainingCost
from fewbits.report.training import cost_line, progress_line, summary_line
from fewbits.train.loop import Loop, StepReport


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("\n".join(f"{i} and {i + 1} make {2 * i + 1}" for i in range(60)))
    return path


def options(text: Path, out: Path, *more: object) -> list[object]:
    return ["--text", text, "--out", out, "--precision", "fp16", "--steps", 6, "--batch", 2, "--length", 16, *more]


def test_training(run_cli: Callable[..., Any], tiny: Path, text: Path, tmp_path: Path) -> None:
    out, file = tmp_path / "out", tmp_path / "run.json"
    ran = run_cli("train", tiny, *options(text, out, "--no-baseline", "--json", file, "--save-every", 4))
    assert (ran.code, ran.err) == (0, "")
    wrote, last = ran.out.splitlines()
    assert wrote.startswith(f"wrote {out}: 6 steps in fp16, 0 skipped; loss ")
    assert last.startswith("fp16: 16.0 bytes per parameter, peak memory ")
    data = json.loads(file.read_text())
    assert [step["step"] for step in data["steps"]] == [1, 2, 3, 4, 5, 6]
    assert data["settings"]["precision"] == "fp16"
    assert data["fp32"] is None
    fewbits.AutoModelForCausalLM.from_pretrained(out)


@pytest.mark.slow
def test_the_last_line_compares_with_fp32(run_cli: Callable[..., Any], tiny: Path, text: Path, tmp_path: Path) -> None:
    file = tmp_path / "run.json"
    adapters = ("--lora", 4, "--base-precision", "int8", "--json", file)
    ran = run_cli("train", tiny, *options(text, tmp_path / "out", *adapters))
    assert ran.code == 0
    assert ran.out.splitlines()[-1].startswith("LoRA in fp16 and fp32, both measured: ")
    data = json.loads(file.read_text())
    assert data["cost"]["bytes_per_parameter"] < 0.7 * data["fp32"]["bytes_per_parameter"]
    assert data["fp32"]["peak_bytes"] > 2**26
    assert data["fp32"]["step_seconds"] > 0


def interrupt_at(monkeypatch: pytest.MonkeyPatch, step: int, times: int) -> None:
    plain = Loop.step

    def interrupted(loop: Loop) -> StepReport:
        if loop.steps_done + 1 == step:
            for _ in range(times):
                signal.raise_signal(signal.SIGINT)
        return plain(loop)

    monkeypatch.setattr(Loop, "step", interrupted)


def test_ctrl_c_saves_and_says_how_to_go_on(
    run_cli: Callable[..., Any], tiny: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_cli("train", tiny, *options(text, tmp_path / "whole", "--no-baseline"))
    arguments = options(text, tmp_path / "out", "--no-baseline", "--save-every", 100)
    with monkeypatch.context() as patch:
        interrupt_at(patch, 3, times=1)
        ran = run_cli("train", tiny, *arguments)
    assert (ran.code, ran.out) == (130, "")
    told, error = ran.err.splitlines()
    assert told == "stopping after this step; Ctrl-C again stops at once"
    checkpoints = tmp_path / "out.checkpoints"
    expected = f"the checkpoint of step 3 is in {checkpoints}; the same command with --resume goes on there"
    assert error == f"error: interrupted; {expected}"
    assert run_cli("train", tiny, *arguments, "--resume").code == 0
    whole, resumed = (tmp_path / name / "model.safetensors" for name in ("whole", "out"))
    assert whole.read_bytes() == resumed.read_bytes()


def test_a_second_ctrl_c_stops_at_once(
    run_cli: Callable[..., Any], tiny: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupt_at(monkeypatch, 3, times=2)
    ran = run_cli("train", tiny, *options(text, tmp_path / "out", "--no-baseline", "--save-every", 2))
    assert ran.code == 130
    assert "error: interrupted; the checkpoint of step 2 is in" in ran.err
    ran = run_cli("train", tiny, *options(text, tmp_path / "other", "--no-baseline", "--save-every", 5))
    assert "error: interrupted; there is no checkpoint yet, so the run begins anew" in ran.err
    assert not (tmp_path / "other.checkpoints").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--precision", "fp61"), "recipe 'fp61' is unknown; did you mean fp16?"),
        (("--base-precision", "int8"), "give --lora 16 too"),
        (("--resume",), "--resume: there is no checkpoint in"),
        (("--length", "5000"), "and a window has 5000"),
        (("--lr", "-1"), "--lr is -1.0: a positive number is needed"),
    ],
)
def test_bad_input_is_one_line(
    run_cli: Callable[..., Any], tiny: Path, text: Path, tmp_path: Path, arguments: tuple[str, ...], message: str
) -> None:
    ran = run_cli("train", tiny, *options(text, tmp_path / "out", *arguments))
    assert (ran.code, ran.out) == (2, "")
    assert ran.err.startswith("error: ")
    assert ran.err.count("\n") == 1
    if arguments[0] != "--length":  # the context of the model may be shorter still
        assert message in ran.err
    assert not (tmp_path / "out").exists()


def report(step: int, loss: float, *, skipped: bool = False) -> StepReport:
    return StepReport(step, loss, 1e-4, skipped, 2.0**14, 1.0, 0.5, 512)


def test_lines() -> None:
    reports = [report(step, 4 - step / 10, skipped=step == 2) for step in range(1, 6)]
    assert progress_line(reports) == "loss 3.500  scale 2^14  skipped 1  1,024 tokens/s"
    expected = "5 steps in fp16, 1 skipped; loss 3.800 → 3.550 nats/token, in the first and last 2 steps"
    assert summary_line(reports, "fp16") == expected
    assert summary_line([report(1, float("nan"), skipped=True)], "fp16") == "1 steps in fp16, 1 skipped"
    cost = TrainingCost(16.04, 3 * 2**30, 1.234)
    line = "fp16: 16.0 bytes per parameter, peak memory 3.00 GiB, 1.23 s per step"
    assert cost_line("fp16", cost, None) == line
    both = cost_line("fp16", cost, TrainingCost(16.0, 4 * 2**30, 1.0))
    assert both == (
        "fp16 and fp32, both measured: 16.0 and 16.0 bytes per parameter, peak memory 3.00 GiB and 4.00 GiB, "
        "1.23 and 1 s per step"
    )
