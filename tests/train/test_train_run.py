"""A run from text to trained model: the loss falls, what is written loads, a run cut off goes on with the same bits."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers

import fewbits
from fewbits.train.loop import Loop, StepReport
from fewbits.train.run import train
from fewbits.train.settings import Settings

pytestmark = pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"
)  # asked by peft

STEPS = 6


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, save_tiny: Callable[..., Any]) -> Path:
    """A tiny Llama with dropout, so that the random state counts; do not change it."""
    folder = tmp_path_factory.mktemp("model") / "tiny"
    save_tiny(folder, attention_dropout=0.1)
    return folder


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Lines that follow a rule: about 40 windows of 32 tokens."""
    path = tmp_path_factory.mktemp("text") / "counting.txt"
    path.write_text("\n".join(f"{i} and {i + 1} make {2 * i + 1}" for i in range(60)))
    return path


@pytest.fixture
def settings(model: Path, text: Path) -> Settings:
    return Settings(
        model=str(model), text=str(text), precision="fp16", steps=STEPS, batch=3, length=32, accumulate=2, lr=1e-3,
        save_every=2,
    )  # fmt: skip


def weights(folder: Path) -> bytes:
    (file,) = folder.glob("*.safetensors")
    return file.read_bytes()


def numbers(reports: list[StepReport]) -> list[StepReport]:
    """The reports without the time they took."""
    return [replace(report, seconds=0.0) for report in reports]


class Cut(Exception):  # noqa: N818 - nothing is wrong
    pass


def cut_at(step: int) -> Callable[[StepReport], None]:
    def cut(report: StepReport) -> None:
        if report.step == step:
            raise Cut

    return cut


ADAPTERS = {"lora": 4, "base_precision": "int8"}


@pytest.mark.parametrize(
    "changes",
    [{"precision": name} for name in ("fp32", "fp16", "bf16", "fp8")]
    + [ADAPTERS | {"precision": "bf16", "lr": 1e-2}, {"lora": 4, "precision": "fp16", "lr": 1e-2}],
    ids=str,
)
def test_the_loss_falls(settings: Settings, tmp_path: Path, changes: dict[str, Any]) -> None:
    reports = train(replace(settings, steps=16, save_every=None, **changes), tmp_path / "out")
    assert [report.step for report in reports] == [*range(1, 17)]
    assert not any(report.skipped for report in reports)
    losses = [report.loss for report in reports]
    assert sum(losses[-4:]) < sum(losses[:4]) - 1
    assert {path.name for path in tmp_path.iterdir()} == {"out"}  # no checkpoint is left


def test_what_is_written_is_the_trained_model(settings: Settings, model: Path, tmp_path: Path) -> None:
    losses: list[float] = []

    def look(loop: Loop) -> None:
        ids = loop.windows.take(0, 4)
        loop.model.eval()
        with torch.no_grad():
            losses.append(float(loop.model(input_ids=ids, labels=ids).loss))

    train(settings, tmp_path / "out", on_trained=look)
    written = fewbits.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert written.dtype == torch.bfloat16  # as the source is
    ids = Loop(settings).windows.take(0, 4)
    for each in (written.float(), transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").float()):
        with torch.no_grad():
            assert float(each.eval()(input_ids=ids, labels=ids).loss) == pytest.approx(losses[0], rel=0.01)
    assert weights(tmp_path / "out") != weights(model)
    tokenizer = fewbits.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer("1 and 2")["input_ids"] == fewbits.AutoTokenizer.from_pretrained(model)("1 and 2")["input_ids"]
    modes = {path.stat().st_mode for path in (tmp_path / "out").iterdir()}
    assert len(modes) == 1


def test_adapters_are_written_as_peft_writes_them(settings: Settings, model: Path, tmp_path: Path) -> None:
    trained: list[torch.Tensor] = []
    ids = torch.arange(3, 35).view(1, 32)

    def look(loop: Loop) -> None:
        assert {name for name, param in loop.model.named_parameters() if param.requires_grad} == {
            name for name, _ in loop.model.named_parameters() if "lora_" in name
        }
        with torch.no_grad():
            trained.append(loop.model.eval()(input_ids=ids).logits)

    train(replace(settings, **ADAPTERS), tmp_path / "out", on_trained=look)
    base = fewbits.AutoModelForCausalLM.from_pretrained(model, precision="int8")
    adapted = peft.PeftModel.from_pretrained(base, tmp_path / "out").eval()
    with torch.no_grad():
        assert torch.equal(adapted(input_ids=ids).logits, trained[0])


def test_a_weight_that_outgrew_the_dtype_of_the_source_is_written_in_float32(
    settings: Settings, tmp_path: Path, save_tiny: Callable[..., Any]
) -> None:
    save_tiny(tmp_path / "half", dtype=torch.float16)

    def grow(loop: Loop) -> None:
        with torch.no_grad():
            next(loop.model.parameters())[0, 0] = 1e5

    plain = replace(settings, model=str(tmp_path / "half"), steps=1)
    train(plain, tmp_path / "out")
    assert fewbits.AutoModelForCausalLM.from_pretrained(tmp_path / "out").dtype == torch.float16
    train(plain, tmp_path / "out", overwrite=True, on_trained=grow)
    grown = fewbits.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert grown.dtype == torch.float32
    assert next(grown.parameters())[0, 0] == 1e5


@pytest.mark.parametrize(
    ("changes", "step"),
    [({}, 3), ({}, 4), ({}, 5), ({}, STEPS), ({"precision": "fp8"}, 5), ({"precision": "bf16"}, 4), (ADAPTERS, 4)],
    ids=str,
)
def test_a_run_that_is_cut_off_goes_on_with_the_same_bits(
    settings: Settings, tmp_path: Path, changes: dict[str, Any], step: int
) -> None:
    settings = replace(settings, **changes)
    reports = train(settings, tmp_path / "whole")
    with pytest.raises(Cut):
        train(settings, tmp_path / "cut", on_step=cut_at(step))
    assert not (tmp_path / "cut").exists()
    torch.manual_seed(99)  # the random state is the checkpoint's, not the process's
    again = train(replace(settings, save_every=5), tmp_path / "cut", resume=True)
    assert numbers(again) == numbers(reports)
    assert weights(tmp_path / "cut") == weights(tmp_path / "whole")


@pytest.mark.slow
def test_a_run_that_is_killed_goes_on_with_the_same_bits(settings: Settings, tmp_path: Path) -> None:
    """Twice: while it writes its second checkpoint, and at a random step after that."""
    reports = train(settings, tmp_path / "whole")
    at_random = random.SystemRandom().randrange(3, STEPS + 1)

    def killed(resume: bool, step: int, while_writing: bool) -> None:
        arguments = [settings.to_json(), str(tmp_path / "killed"), resume, step, while_writing]
        ran = subprocess.run(
            [sys.executable, Path(__file__).with_name("killed_run.py"), json.dumps(arguments)],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert ran.returncode == -signal.SIGKILL, ran.stderr

    killed(resume=False, step=4, while_writing=True)
    checkpoints = tmp_path / "killed.checkpoints"
    assert {path.name for path in checkpoints.iterdir()} == {"step-00000002", ".step-00000004.incomplete"}
    killed(resume=True, step=at_random, while_writing=False)
    again = train(settings, tmp_path / "killed", resume=True)
    assert numbers(again) == numbers(reports), f"killed at step {at_random}"
    assert weights(tmp_path / "killed") == weights(tmp_path / "whole"), f"killed at step {at_random}"
    assert not checkpoints.exists()


def test_the_seed_gives_the_order_and_the_bits(settings: Settings, tmp_path: Path) -> None:
    for name, seed in (("one", 1), ("one again", 1), ("two", 2)):
        train(replace(settings, seed=seed, steps=2), tmp_path / name)
    assert weights(tmp_path / "one") == weights(tmp_path / "one again")
    assert weights(tmp_path / "one") != weights(tmp_path / "two")


def test_a_skipped_step_uses_up_none_of_the_schedule(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    plain, other = Loop(replace(settings, accumulate=1)), Loop(replace(settings, accumulate=1))
    rates = [plain.step().lr for _ in range(4)]
    backward = other.mp.backward
    calls = iter(range(10))
    monkeypatch.setattr(other.mp, "backward", lambda loss: backward(loss * (float("nan") if next(calls) == 1 else 1)))
    reports = [other.step() for _ in range(5)]
    assert [report.skipped for report in reports] == [False, True, False, False, False]
    assert [report.lr for report in reports if not report.skipped] == rates


def test_the_rate_goes_up_in_a_line_and_down_to_nearly_nothing(settings: Settings) -> None:
    from fewbits.train.schedule import learning_rate

    rates = [learning_rate(1.0, 1000, step) for step in range(1000)]
    assert rates[:100] == pytest.approx([(step + 1) / 100 for step in range(100)])
    assert rates[550] == pytest.approx(0.5)
    assert rates[100:] == sorted(rates[100:], reverse=True)
    assert 0 < rates[-1] < 1e-5
    assert learning_rate(1.0, 1, 0) == 1.0


def test_every_window_is_read_once_an_epoch_in_another_order(settings: Settings) -> None:
    windows = Loop(settings).windows
    count = len(windows.tokens)
    first, second = windows.take(0, count), windows.take(count, count)
    everything = sorted(windows.tokens.tolist())
    assert sorted(first.tolist()) == sorted(second.tolist()) == everything
    assert not torch.equal(first, second)
    over_the_end = windows.take(count - 2, 4)
    assert torch.equal(over_the_end, torch.cat([first[-2:], second[:2]]))
