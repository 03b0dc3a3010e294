"""A conversion that was killed goes on where it was, and its result is that of one that was not."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import fewbits
from fewbits.errors import OverflowWarning
from fewbits.models.resumable import RECORD
from fewbits.models.safetensors_folder import SafetensorsFolder
from fewbits.models.source import open_source
from fewbits.models.staging import staged_folder
from fewbits.quantize.conversion import Conversion

ROWS = 21  # tensors of the tiny model
PRECISIONS = ("int8", "fp16")

# Convert in one forked process per point; each kills itself there. What is done is recorded at once, not in batches.
KILL = """
import os, signal, sys
from pathlib import Path
import fewbits, torch
from fewbits.models.architecture import empty_model
from fewbits.models.resumable import Resumable
from fewbits.models.safetensors_writer import SafetensorsWriter
from fewbits.models.source import open_source
from transformers import PreTrainedTokenizerBase

source, out, to = sys.argv[1:4]
empty_model(open_source(source).config, torch.bfloat16)  # what it imports, every child has then; no thread is started
open_source(source).tokenizer()

def kill(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)

def at_write(number, kill_inside=False):
    count, write, write_all = 0, SafetensorsWriter.write, SafetensorsWriter._write_all
    def counted(self, name, tensor):
        nonlocal count
        count += 1
        if count == number and kill_inside:
            SafetensorsWriter._write_all = lambda self, data: (write_all(self, data[:len(data) // 2]), kill())
        write(self, name, tensor)
        if count == number:
            kill()
    SafetensorsWriter.write = counted

def at_rename(number):
    count, rename = 0, Path.rename
    def counted(self, target):
        nonlocal count
        count += 1
        if count == number:
            kill()
        return rename(self, target)
    Path.rename = counted

def at_tokenizer():
    PreTrainedTokenizerBase.save_pretrained = kill

def unflushed():
    Resumable.record = record
    at_write(10)

record, flush = Resumable.record, Resumable.flush
def record_at_once(self, step, extra=None):
    record(self, step, extra)
    flush(self)
Resumable.record = record_at_once
os.fsync = lambda _: None  # a kill loses nothing that was written, only a power failure does

POINTS = {
    "staged": lambda: setattr(SafetensorsWriter, "__enter__", kill),
    "first write": lambda: at_write(1),
    "second write": lambda: at_write(2),
    "inside a write": lambda: at_write(9, kill_inside=True),
    "tenth write": lambda: at_write(10),
    "unflushed": unflushed,
    "tokenizer": at_tokenizer,
    "rename": lambda: at_rename(1),
}
for point, prepare in POINTS.items():
    child = os.fork()
    if not child:
        prepare()
        fewbits.convert(source, f"{out}/{point}", to)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL, point
"""
POINTS = ("staged", "first write", "second write", "inside a write", "tenth write", "unflushed", "tokenizer", "rename")


@pytest.fixture(scope="module", params=PRECISIONS)
def killed(request: pytest.FixtureRequest, tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A folder where conversions were killed, one at each point."""
    folder = tmp_path_factory.mktemp("killed")
    subprocess.run([sys.executable, "-c", KILL, tiny, folder, request.param], check=True)
    return folder, request.param


@pytest.fixture(scope="module")
def whole(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, Conversion]]:
    """What a conversion gives that nothing stopped."""
    folder = tmp_path_factory.mktemp("whole")
    done = {to: fewbits.convert(tiny, folder / to, to) for to in PRECISIONS}
    return lambda to: (folder / to, done[to])


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The tensors that are read of the source."""
    names: list[str] = []
    read = SafetensorsFolder.read

    def counted(self: SafetensorsFolder, name: str) -> torch.Tensor:
        names.append(name)
        return read(self, name)

    monkeypatch.setattr(SafetensorsFolder, "read", counted)
    return names


def files(folder: Path) -> dict[str, bytes]:
    return {os.fspath(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def recorded(staging: Path) -> list[str]:
    if not (staging / RECORD).is_file():
        return []
    return [line["step"] for line in map(json.loads, (staging / RECORD).read_text().splitlines()) if "step" in line]


@pytest.mark.parametrize("point", POINTS)
def test_it_goes_on_where_it_was(
    killed: tuple[Path, str], whole: Callable, tiny: Path, reads: list[str], point: str
) -> None:
    folder, to = killed
    assert not (folder / point).exists()
    there = recorded(folder / f".{point}.incomplete")
    expected = {"first write": 0, "second write": 1, "inside a write": 8, "tenth write": 9, "tokenizer": ROWS}
    if to == "int8":  # three tensors that are kept, then codes and scales: the ninth write is the third layer's scales
        expected |= {"inside a write": 5, "tenth write": 6}
    if point in expected:
        assert len(there) == expected[point]
    seen: list[tuple[int, int]] = []
    done = fewbits.convert(tiny, folder / point, to, progress=lambda *step: seen.append(step))
    assert len(reads) == ROWS - len(there), "what was done is not done again"
    assert not set(reads) & set(there)
    expected_folder, expected_done = whole(to)
    assert files(folder / point) == files(expected_folder)
    assert (done.casts, done.manifest, done.nbytes) == (expected_done.casts, expected_done.manifest, done.nbytes)
    if seen:
        assert seen[-1] == (done.nbytes, done.nbytes)
    assert not (folder / f".{point}.incomplete").exists()


# --- stopped in this process: Ctrl-C, which keeps what is done ----------------------------------------------------


class Stop:
    """Ctrl-C before a tensor is written."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, at: str) -> None:
        from fewbits.models.safetensors_writer import SafetensorsWriter

        write = SafetensorsWriter.write

        def stop(writer: SafetensorsWriter, name: str, tensor: torch.Tensor) -> None:
            if name == at:
                raise KeyboardInterrupt
            write(writer, name, tensor)

        self.patch = monkeypatch.context()
        self.stop = stop

    def __call__(self, *arguments: Any, **options: Any) -> None:
        with self.patch as patch:
            patch.setattr("fewbits.models.safetensors_writer.SafetensorsWriter.write", self.stop)
            with pytest.raises(KeyboardInterrupt) as stopped:
                fewbits.convert(*arguments, **options)
        assert stopped.value.__notes__ == ["what is done is kept: run the same again, and it goes on there"]


@pytest.fixture
def stop(monkeypatch: pytest.MonkeyPatch) -> Stop:
    return Stop(monkeypatch, "model.layers.1.mlp.up_proj.weight")


@pytest.fixture
def model(tiny: Path, tmp_path: Path) -> Path:
    return shutil.copytree(tiny, tmp_path / "model")


@pytest.mark.parametrize("to", PRECISIONS)
def test_ctrl_c_keeps_what_is_done(
    model: Path, tmp_path: Path, whole: Callable, stop: Stop, reads: list[str], to: str
) -> None:
    stop(model, tmp_path / "new/folder/out", to)
    there = recorded(tmp_path / "new/folder/.out.incomplete")
    assert 0 < len(there) < ROWS
    reads.clear()
    fewbits.convert(model, tmp_path / "new/folder/out", to)
    assert len(reads) == ROWS - len(there)
    written, expected = files(tmp_path / "new/folder/out"), files(whole(to)[0])
    mark, expected_mark = (json.loads(data.pop("fewbits.json")) for data in (written, expected))
    assert written == expected
    assert mark == expected_mark | {"source": "model"}


CHANGES: dict[str, Callable[[Path], dict[str, Any]]] = {
    "precision": lambda _: {"to": "bf16"},
    "overflow": lambda _: {"overflow": "saturate"},
    "weights": lambda model: os.utime(model / "model.safetensors", ns=(0, 1)) or {},
    "config": lambda model: os.utime(model / "config.json", ns=(0, 1)) or {},
}


@pytest.mark.parametrize("change", CHANGES)
def test_other_work_begins_anew(model: Path, tmp_path: Path, stop: Stop, reads: list[str], change: str) -> None:
    stop(model, tmp_path / "out", to="fp16")
    reads.clear()
    options = {"to": "fp16"} | CHANGES[change](model)
    fewbits.convert(model, tmp_path / "out", **options)
    assert len(reads) == ROWS
    fewbits.convert(model, tmp_path / "expected", **options)
    assert files(tmp_path / "out") == files(tmp_path / "expected")


def test_layers_that_are_kept_are_other_work(model: Path, tmp_path: Path, stop: Stop, reads: list[str]) -> None:
    stop(model, tmp_path / "out")
    reads.clear()
    fewbits.convert(model, tmp_path / "out", keep=["*.k_proj"])
    assert len(reads) == ROWS


def test_another_version_begins_anew(
    model: Path, tmp_path: Path, stop: Stop, reads: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    stop(model, tmp_path / "out")
    reads.clear()
    monkeypatch.setattr("fewbits.models.resumable.version", lambda _: "99.0")
    fewbits.convert(model, tmp_path / "out")
    assert len(reads) == ROWS


DAMAGE: dict[str, Callable[[Path], object]] = {
    "weights gone": lambda staging: (staging / "model.safetensors").unlink(),
    "weights cut off": lambda staging: os.truncate(staging / "model.safetensors", 10_000),
    "header changed": lambda staging: (staging / "model.safetensors").write_bytes(bytes(500_000)),
    "record gone": lambda staging: (staging / RECORD).unlink(),
    "record cut off": lambda staging: os.truncate(staging / RECORD, (staging / RECORD).stat().st_size - 7),
    "record empty": lambda staging: (staging / RECORD).write_bytes(b""),
    "record garbage": lambda staging: (staging / RECORD).write_bytes(b"\xff\0\n[]\n"),
    "files added": lambda staging: (staging / "folder/stale").mkdir(parents=True),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_what_is_damaged_is_done_again(model: Path, tmp_path: Path, stop: Stop, reads: list[str], damage: str) -> None:
    fewbits.convert(model, tmp_path / "expected", "fp16")
    stop(model, tmp_path / "out", "fp16")
    there = len(recorded(tmp_path / ".out.incomplete"))
    reads.clear()
    DAMAGE[damage](tmp_path / ".out.incomplete")
    fewbits.convert(model, tmp_path / "out", "fp16")
    again = {"record cut off": 1, "files added": 0}.get(damage, there)
    assert len(reads) == ROWS - there + again
    assert files(tmp_path / "out") == files(tmp_path / "expected")


def test_an_overflow_is_told_in_the_same_words(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = load_file(model / "model.safetensors")
    names = ["model.layers.1.post_attention_layernorm.weight", "model.norm.weight"]
    beyond = {name: torch.full((64,), 1e5, dtype=torch.bfloat16) for name in names}
    save_file(tensors | beyond, model / "model.safetensors")
    with pytest.warns(OverflowWarning) as expected:
        fewbits.convert(model, tmp_path / "expected", "fp16")
    order = list(open_source(model).tensors)
    after = order[min(order.index(name) for name in names) + 1]
    Stop(monkeypatch, after)(model, tmp_path / "out", "fp16")
    assert recorded(tmp_path / ".out.incomplete")
    with pytest.warns(OverflowWarning) as told:
        fewbits.convert(model, tmp_path / "out", "fp16")
    assert str(told[0].message) == str(expected[0].message)
    assert all(name in str(told[0].message) for name in names)
    assert files(tmp_path / "out") == files(tmp_path / "expected")


def test_two_at_once_do_not_meet(model: Path, tmp_path: Path) -> None:
    with staged_folder(tmp_path / "out", overwrite=False, nbytes=1) as folder:
        (folder / "mine").touch()
        message = r"out is being written by another process; wait for it, or give another name"
        with pytest.raises(fewbits.FewbitsError, match=message):
            fewbits.convert(model, tmp_path / "out")
        assert (folder / "mine").exists()
    assert (tmp_path / "out/mine").exists()


WAIT = """
import sys, fewbits
fewbits.convert(*sys.argv[1:], on_manifest=lambda _: (print("ready", flush=True), sys.stdin.read()))
"""


def test_another_process_is_not_disturbed(model: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-c", WAIT, model, tmp_path / "out"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdin is not None
        process.stdout.readline()
        with pytest.raises(fewbits.FewbitsError, match="is being written by another process"):
            fewbits.convert(model, tmp_path / "out")
        process.stdin.close()
        assert process.wait(60) == 0
    assert load_file(tmp_path / "out/model.safetensors")


def test_folders_made_for_a_conversion_that_fails_go_again(model: Path, tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    with (
        pytest.raises(fewbits.FewbitsError, match="GB are needed"),
        staged_folder(tmp_path / "there/a/b/out", overwrite=False, nbytes=2**62),
    ):
        pass
    with pytest.raises(ZeroDivisionError):
        fewbits.convert(model, tmp_path / "there/a/b/out", on_manifest=lambda _: 1 / 0)
    assert list((tmp_path / "there").iterdir()) == []
