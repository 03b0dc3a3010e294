"""Bad input to a training run: each refused with the thing, the value and the remedy, and nothing half done."""

from __future__ import annotations

import builtins
import re
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from fewbits import FewbitsError
from fewbits.train.loop import SKIPS_IN_A_ROW, Loop, StepReport
from fewbits.train.run import train
from fewbits.train.settings import Settings


@pytest.fixture
def settings(tiny: Path, tmp_path: Path) -> Settings:
    text = tmp_path / "text.txt"
    text.write_text("1 and 2 make 3\n" * 40)
    return Settings(model=str(tiny), text=str(text), precision="fp16", steps=4, batch=2, length=16, save_every=2)


def refused(message: str) -> Any:
    return pytest.raises(FewbitsError, match=re.escape(message))


class Cut(Exception):  # noqa: N818 - nothing is wrong
    pass


@pytest.fixture
def cut_off(settings: Settings, tmp_path: Path) -> Path:
    """The output folder of a run that ended after its checkpoint of step 2."""

    def cut(report: StepReport) -> None:
        if report.step == 3:
            raise Cut

    with pytest.raises(Cut):
        train(settings, tmp_path / "out", on_step=cut)
    return tmp_path / "out"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 0}, "--steps is 0: a whole number from 1 is needed"),
        ({"batch": -1}, "--batch is -1: a whole number from 1 is needed"),
        ({"length": 1}, "--length is 1: a whole number from 2 is needed"),
        ({"accumulate": 1.5}, "--accumulate is 1.5: a whole number from 1 is needed"),
        ({"save_every": 0}, "--save-every is 0: a whole number from 1 is needed"),
        ({"lora": 0}, "--lora is 0: a whole number from 1 is needed"),
        ({"lr": 0.0}, "--lr is 0.0: a positive number is needed, such as 5e-05"),
        ({"lr": float("nan")}, "--lr is nan: a positive number is needed"),
        ({"precision": "fp61"}, "recipe 'fp61' is unknown; did you mean fp16?"),
        ({"seed": 1 << 32}, "recipe fp16: seed=4294967296 is out of range"),
        ({"base_precision": "int8"}, "--base-precision int8 is of a frozen base under adapters; give --lora 16 too"),
        ({"lora": 4, "base_precision": "int9"}, "precision 'int9' is unknown; did you mean int8?"),
    ],
)
def test_settings(settings: Settings, changes: dict[str, Any], message: str) -> None:
    with refused(message):
        replace(settings, **changes)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty (0 bytes): give a text of at least one window of tokens"),
        (b" \n\t ", "is empty (4 bytes)"),
        (b"good \xff bad", "is not UTF-8: byte 0xff at offset 5; save it as UTF-8"),
        (b"2 words", "and a window has 16: give a longer text, or --length"),
    ],
)
def test_texts(settings: Settings, tmp_path: Path, content: bytes, message: str) -> None:
    Path(settings.text).write_bytes(content)
    with refused(message):
        train(settings, tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} == {"text.txt"}


def test_texts_that_are_no_files(settings: Settings, tmp_path: Path) -> None:
    with refused(f"text file {tmp_path} is a folder: give the path of a UTF-8 text file"):
        train(replace(settings, text=str(tmp_path)), tmp_path / "new" / "out")
    with refused("does not exist: give the path of a UTF-8 text file"):
        train(replace(settings, text=str(tmp_path / "none.txt")), tmp_path / "new" / "out")
    assert not (tmp_path / "new").exists()


def test_windows_longer_than_the_context(settings: Settings, tmp_path: Path) -> None:
    with refused("--length is 100000, but the context of "):
        train(replace(settings, length=100_000), tmp_path / "out")


def test_a_model_that_is_quantized_has_no_masters(settings: Settings, tiny_int8: Path, tmp_path: Path) -> None:
    with refused("is stored in int8 and cannot be loaded in fp32; load the model it was converted from"):
        train(replace(settings, model=str(tiny_int8)), tmp_path / "out")
    train(replace(settings, model=str(tiny_int8), lora=2), tmp_path / "out")  # but it is a base for adapters


def test_an_output_that_is_there(settings: Settings, tmp_path: Path) -> None:
    out = tmp_path / "out"
    train(settings, out)
    with refused(f"{out} exists and is not empty; give another folder, or --overwrite to replace it"):
        train(settings, out)
    before = (out / "model.safetensors").read_bytes()
    train(replace(settings, lr=1e-2), out, overwrite=True)
    assert (out / "model.safetensors").read_bytes() != before
    adapters = tmp_path / "adapters"
    train(replace(settings, lora=2), adapters)
    train(replace(settings, lora=2), adapters, overwrite=True)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").touch()
    with refused("holds no model, so --overwrite does not delete it"):
        train(settings, tmp_path / "mine", overwrite=True)


def test_resuming_what_is_not_there(settings: Settings, tmp_path: Path) -> None:
    with refused("--resume: there is no checkpoint in"):
        train(settings, tmp_path / "out", resume=True)
    assert {path.name for path in tmp_path.iterdir()} == {"text.txt"}


def test_beginning_where_a_run_was_cut_off(settings: Settings, cut_off: Path) -> None:
    with refused("out.checkpoints holds a checkpoint of step 2; give --resume to go on there, or --overwrite to begin"):
        train(settings, cut_off)
    reports = train(replace(settings, lr=1e-2), cut_off, overwrite=True)  # begins anew, with other settings
    assert len(reports) == 4


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lr": 1e-2}, "made with no --lr, but now it is --lr 0.01; give the same, or --overwrite without --resume"),
        ({"precision": "bf16"}, "made with --precision fp16, but now it is --precision bf16"),
        ({"steps": 8}, "made with --steps 4, but now it is --steps 8"),
        ({"lora": 2}, "made with no --lora, but now it is --lora 2"),
    ],
)
def test_resuming_with_other_settings(settings: Settings, cut_off: Path, changes: dict[str, Any], message: str) -> None:
    with refused(f"--resume: the checkpoint was {message}"):
        train(replace(settings, **changes), cut_off, resume=True)
    train(settings, cut_off, resume=True)  # the checkpoint is as it was


def test_resuming_with_another_text(settings: Settings, cut_off: Path) -> None:
    Path(settings.text).write_text("3 and 4 make 7\n" * 40)
    with refused("is not the one that the checkpoint was made with; give that, or --overwrite without --resume"):
        train(settings, cut_off, resume=True)


@pytest.mark.parametrize("damage", ["cut", "other"])
def test_a_checkpoint_that_is_damaged(settings: Settings, cut_off: Path, damage: str) -> None:
    (path,) = cut_off.with_name("out.checkpoints").glob("*/state.pt")
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:1000])
    else:
        torch.save({"weights": 1}, path)
    wrong = "cannot be read (RuntimeError); remove" if damage == "cut" else "is not of this version of fewbits; remove"
    with refused(wrong):
        train(settings, cut_off, resume=True)


def test_two_runs_to_one_folder(settings: Settings, tmp_path: Path) -> None:
    def second(report: StepReport) -> None:
        with refused("out is being written by another process; wait for it, or give another name"):
            train(settings, tmp_path / "out")

    train(replace(settings, steps=1), tmp_path / "out", on_step=second)


def test_a_full_disk_is_seen_before_a_checkpoint_is_begun(
    settings: Settings, cut_off: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(1, 1, 1000))
    with refused("GB are free on its disk; free some or give a folder on another disk"):
        train(settings, cut_off, resume=True)
    monkeypatch.undo()
    assert len(train(settings, cut_off, resume=True)) == 4  # from the last whole checkpoint


@pytest.mark.skipif(sys.platform == "win32", reason="limits of a process are POSIX")
def test_a_write_that_fails_leaves_the_last_checkpoint(settings: Settings, cut_off: Path) -> None:
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises((OSError, RuntimeError)) as failed:
            train(settings, cut_off, resume=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert isinstance(failed.value, OSError)
    checkpoints = cut_off.with_name("out.checkpoints")
    assert [path.name for path in checkpoints.iterdir()] == ["step-00000002"]
    assert len(train(settings, cut_off, resume=True)) == 4


def test_a_run_that_only_skips_ends(settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    micro_batch = Loop._micro_batch

    def broken(loop: Loop, number: int) -> float:
        loss = micro_batch(loop, number)
        next(loop.model.parameters()).grad[0, 0] = float("nan")
        return loss

    monkeypatch.setattr(Loop, "_micro_batch", broken)
    with refused(
        f"steps 1 to {SKIPS_IN_A_ROW} were all skipped, at last since model.embed_tokens.weight has 0 Inf and 1 NaN; "
        "give --precision bf16, or a lower --lr"
    ):
        train(replace(settings, steps=100), tmp_path / "out")


def test_adapters_without_peft(settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real: Callable[..., Any] = builtins.__import__

    def without(name: str, *rest: Any) -> Any:
        if name == "peft":
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    with refused("--lora: adapters are those of PEFT, which is not installed; pip install peft"):
        train(replace(settings, lora=2), tmp_path / "out")
