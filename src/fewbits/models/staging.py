"""A folder is written whole or not at all: under a temporary name beside it, then renamed.

.NAME.incomplete   being written, by the one process that holds its lock; a kill leaves it, and the next run goes on
.NAME.replaced     the old one, between two renames
"""

from __future__ import annotations

import errno
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fewbits.errors import FewbitsError
from fewbits.models.resumable import RECORD, begin_record, recorded_files, recorded_fingerprint

if sys.platform != "win32":
    import fcntl

MARK = "fewbits.json"
"""The file that every folder written by fewbits holds: what it was converted from, and the manifest."""


@contextmanager
def staged_folder(out: Path, *, overwrite: bool, nbytes: int, fingerprint: str | None = None) -> Iterator[Path]:
    """Give a temporary folder that becomes ``out`` when the block ends, and vanishes if the block raises.

    A killed process leaves it behind, and so does Ctrl-C if a step is recorded (see ``resumable``). Where that is the
    same work, by its fingerprint, the folder comes with the files that the record names; else it comes empty.

    Args:
        out: The folder to write. An empty one may exist.
        overwrite: Replace a folder that holds a model.
        nbytes: Bytes that will be written.
        fingerprint: What the result depends on; None: always from the beginning.

    Raises:
        FewbitsError: If ``out`` exists and may not be replaced, another process is writing it, or the disk has not the
            room.
        OSError: If it cannot be written.
    """
    refuse_to_replace(out, overwrite)
    staging = out.parent / f".{out.name}.incomplete"
    with parents_made(out), locked(staging, out):
        try:
            _clear(staging, fingerprint)
            refuse_full_disk(out, nbytes - _bytes_on_disk(staging))
            yield staging
            (staging / RECORD).unlink(missing_ok=True)
            swap(staging, out)
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt) and recorded_files(staging):
                error.add_note("what is done is kept: run the same again, and it goes on there")
                raise
            shutil.rmtree(staging, ignore_errors=True)
            if isinstance(error, OSError) and error.errno and error.filename is None:  # a full disk names none
                error.filename = os.fspath(out)
            raise


@contextmanager
def parents_made(out: Path) -> Iterator[None]:
    """Make the folders above ``out``; if the block raises, those made here go again, if they are empty."""
    made = [parent for parent in out.absolute().parents if not parent.exists()]
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        yield
    except BaseException:
        for parent in made:
            try:
                parent.rmdir()
            except OSError:
                break
        raise


@contextmanager
def locked(staging: Path, out: Path) -> Iterator[None]:
    """Make the temporary folder and hold it alone until the block ends, by a lock that ends with the process."""
    while True:
        if staging.is_symlink() or staging.is_file():
            raise FewbitsError(f"{staging} is in the way: it is no folder of fewbits; remove it or rename it")
        staging.mkdir(exist_ok=True)
        if sys.platform == "win32":  # has no locks on folders
            yield
            return
        try:
            descriptor = os.open(staging, os.O_RDONLY | os.O_DIRECTORY)
        except FileNotFoundError:  # another process has just finished
            continue
        try:
            _lock(descriptor, out)
            if staging.exists() and os.path.samestat(os.fstat(descriptor), staging.stat()):
                yield
                return
        finally:
            os.close(descriptor)


def _lock(descriptor: int, out: Path) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EWOULDBLOCK, errno.EAGAIN):
            raise FewbitsError(
                f"{out} is being written by another process; wait for it, or give another name"
            ) from None
        # else a file system without locks, such as some over a network: two processes are not told from one


def _clear(staging: Path, fingerprint: str | None) -> None:
    """Leave what the record of the same work names, and otherwise nothing; begin the record where there is none."""
    goes_on = fingerprint is not None and recorded_fingerprint(staging) == fingerprint
    kept = {RECORD, *recorded_files(staging)} if goes_on else set()
    if not goes_on:  # first, so that no kill leaves a record of files that are gone
        (staging / RECORD).unlink(missing_ok=True)
    for path in staging.iterdir():
        if path.name in kept:
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()
    if fingerprint is not None and not goes_on:
        begin_record(staging, fingerprint)


def _bytes_on_disk(folder: Path) -> int:
    """Bytes that the files of a folder take; one that is written in any order has holes."""
    return sum(path.stat().st_blocks * 512 for path in folder.iterdir())


def refuse_to_replace(out: Path, overwrite: bool) -> None:
    """Refuse to write a folder where something else is.

    Raises:
        FewbitsError: If ``out`` is no name for a folder, a file, or a folder that may not be replaced.
    """
    if out.name in ("", ".."):
        raise FewbitsError(f"{out} is no name for a new folder; give one, such as {out / 'model'}")
    if out.is_file() or out.is_symlink():
        kind = "link" if out.is_symlink() else "file"
        raise FewbitsError(f"{out} is a {kind}; the output is a folder, so give another name")
    if not out.exists() or not any(out.iterdir()):
        return
    if not overwrite:
        raise FewbitsError(f"{out} exists and is not empty; give another folder, or --overwrite to replace it")
    if not (out / MARK).exists() and not ((out / "config.json").exists() and any(out.glob("*.safetensors"))):
        raise FewbitsError(f"{out} holds no model, so --overwrite does not delete it; remove it yourself or rename")


def refuse_full_disk(out: Path, nbytes: int) -> None:
    """Refuse to begin what the disk has not the room for.

    Raises:
        FewbitsError: If fewer than ``nbytes`` are free where ``out`` will be.
    """
    free = shutil.disk_usage(out.parent).free
    if nbytes > free:
        raise FewbitsError(
            f"{out}: {nbytes / 1e9:.2f} GB are needed and {free / 1e9:.2f} GB are free on its disk; "
            "free some or give a folder on another disk"
        )


def swap(staging: Path, out: Path) -> None:
    """Put the new folder in the place of the old one; the old one is gone only when the new one stands."""
    old = out.parent / f".{out.name}.replaced"
    if out.exists():  # else a kill came between the renames, and the old one is the only one
        shutil.rmtree(old, ignore_errors=True)
    try:
        if out.exists():
            out.rename(old)
        staging.rename(out)
    except BaseException:
        if old.exists() and not out.exists():
            old.rename(out)
        raise
    shutil.rmtree(old, ignore_errors=True)
