"""A folder is there whole or not at all, and nothing that holds no model is ever deleted."""

import errno
import shutil
from contextlib import suppress
from pathlib import Path

import pytest

from fewbits.errors import FewbitsError
from fewbits.models.resumable import RECORD, Resumable
from fewbits.models.staging import MARK, staged_folder


def make(folder: Path, *files: str) -> Path:
    folder.mkdir(parents=True)
    for file in files:
        (folder / file).write_text("old")
    return folder


def write(out: Path, *, overwrite: bool = False, nbytes: int = 1) -> None:
    with staged_folder(out, overwrite=overwrite, nbytes=nbytes) as folder:
        (folder / MARK).write_text("new")
        assert folder.parent == out.parent, "a rename must not cross disks"


def test_a_folder_appears_when_it_is_complete(tmp_path: Path) -> None:
    out = tmp_path / "a/b/out"
    with staged_folder(out, overwrite=False, nbytes=1) as folder:
        assert folder.is_dir()
        assert not out.exists()
    assert [path.name for path in out.parent.iterdir()] == ["out"]


def test_an_empty_folder_may_be_there(tmp_path: Path) -> None:
    write(make(tmp_path / "out"))
    assert (tmp_path / "out" / MARK).read_text() == "new"


@pytest.mark.parametrize("files", [(MARK,), ("config.json", "model.safetensors")], ids=str)
def test_a_model_is_replaced_if_asked(tmp_path: Path, files: tuple[str, ...]) -> None:
    out = make(tmp_path / "out", "other", *files)
    with pytest.raises(FewbitsError, match=r"exists and is not empty; .* --overwrite to replace it"):
        write(out)
    assert (out / "other").read_text() == "old"
    write(out, overwrite=True)
    assert [path.name for path in out.iterdir()] == [MARK]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("files", [("letter.txt",), ("config.json",), ("model.safetensors",), (".hidden",)], ids=str)
def test_what_holds_no_model_is_never_deleted(tmp_path: Path, files: tuple[str, ...]) -> None:
    out = make(tmp_path / "out", *files)
    with pytest.raises(FewbitsError, match="holds no model, so --overwrite does not delete it"):
        write(out, overwrite=True)
    assert [path.name for path in out.iterdir()] == [*files]


def test_a_file_or_link_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    make(tmp_path / "model", MARK)
    (tmp_path / "link").symlink_to(tmp_path / "model")
    for name in ("file", "link"):
        with pytest.raises(FewbitsError, match=f"{name} is a (file|link)"):
            write(tmp_path / name, overwrite=True)
    assert (tmp_path / "model" / MARK).read_text() == "old"


def test_a_leftover_is_replaced(tmp_path: Path) -> None:
    make(tmp_path / ".out.incomplete", "stale")
    make(tmp_path / ".out.replaced", "stale")
    write(tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == [MARK]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("kind", ["file", "link"])
def test_what_is_in_the_way_is_not_deleted(tmp_path: Path, kind: str) -> None:
    precious = make(tmp_path / "precious", "letter.txt")
    in_the_way = tmp_path / ".out.incomplete"
    in_the_way.touch() if kind == "file" else in_the_way.symlink_to(precious)
    with pytest.raises(FewbitsError, match=r"\.out\.incomplete is in the way: it is no folder of fewbits; remove it"):
        write(tmp_path / "out")
    assert (precious / "letter.txt").read_text() == "old"


def test_the_only_old_one_stays_until_the_new_one_stands(tmp_path: Path) -> None:
    """A kill between the two renames left it."""
    make(tmp_path / ".out.replaced", MARK)
    with pytest.raises(ZeroDivisionError), staged_folder(tmp_path / "out", overwrite=True, nbytes=1):
        _ = 1 / 0
    assert (tmp_path / ".out.replaced" / MARK).read_text() == "old"
    write(tmp_path / "out", overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def stopped(out: Path, fingerprint: str | None, *, nbytes: int = 1) -> list[str]:
    """Write a folder whose first file is done when Ctrl-C comes; the names that were there at the beginning."""
    there: list[str] = []
    with (
        suppress(KeyboardInterrupt),
        staged_folder(out, overwrite=False, nbytes=nbytes, fingerprint=fingerprint) as new,
    ):
        there += sorted(path.name for path in new.iterdir())
        (new / "other").touch()
        with Resumable(new) as record, (new / "data").open("wb", buffering=0) as data:
            record.opened("data", data.fileno())
            data.write(bytes(nbytes * 4 // 5))
            record.wrote("data", "part", nbytes)
            record.record("step")
            record.flush()
            record.closed("data")
        raise KeyboardInterrupt
    return there


def test_only_the_same_work_goes_on(tmp_path: Path) -> None:
    runs = [stopped(tmp_path / "out", fingerprint) for fingerprint in ("a", "a", "b", None, None)]
    assert runs == [[RECORD], [RECORD, "data"], [RECORD], [], []]


def test_a_disk_that_holds_what_is_left_suffices(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)
    stopped(tmp_path / "out", "a", nbytes=1_000_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=300_000))
    assert "data" in stopped(tmp_path / "out", "a", nbytes=1_000_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=100_000))
    with pytest.raises(FewbitsError, match="GB are needed"):
        stopped(tmp_path / "out", "a", nbytes=1_000_000)


def test_a_file_system_without_locks_is_written_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", refuse)
    write(tmp_path / "out")
    assert (tmp_path / "out" / MARK).read_text() == "new"


def test_what_fails_leaves_the_old_one(tmp_path: Path) -> None:
    out = make(tmp_path / "out", MARK)
    with pytest.raises(FileExistsError), staged_folder(out, overwrite=True, nbytes=1) as folder:
        folder.mkdir()
    assert (out / MARK).read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("step", [1, 2])
def test_a_rename_that_fails_leaves_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    out = make(tmp_path / "out", MARK)
    rename, calls = Path.rename, []

    def fail(self: Path, target: Path) -> Path:
        calls.append(target)
        if len(calls) == step:
            raise KeyboardInterrupt
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises(KeyboardInterrupt):
        write(out, overwrite=True)
    assert len(calls) >= step
    assert (out / MARK).read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_full_disk_is_seen_before(tmp_path: Path) -> None:
    free = shutil.disk_usage(tmp_path).free
    with pytest.raises(FewbitsError, match=r"out: [\d.]+ GB are needed and [\d.]+ GB are free on its disk; free some"):
        write(tmp_path / "out", nbytes=2 * free)
    assert list(tmp_path.iterdir()) == []


def test_an_error_without_a_file_name_gets_one(tmp_path: Path) -> None:
    with (
        pytest.raises(OSError, match=rf"\[Errno 28\] No space left on device: '{tmp_path / 'out'}'"),
        staged_folder(tmp_path / "out", overwrite=False, nbytes=1),
    ):
        raise OSError(28, "No space left on device")


@pytest.mark.parametrize("out", [".", "..", "/"])
def test_a_name_that_cannot_be_staged_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, out: str) -> None:
    monkeypatch.chdir(make(tmp_path / "here"))
    with pytest.raises(FewbitsError, match="is no name for a new folder"):
        write(Path(out))
    assert [path.name for path in tmp_path.iterdir()] == ["here"]
