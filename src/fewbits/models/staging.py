"""A folder is written whole or not at all: under a temporary name beside it, then renamed."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fewbits.errors import FewbitsError

MARK = "fewbits.json"
"""The file that every folder written by fewbits holds: what it was converted from, and the manifest."""


@contextmanager
def staged_folder(out: Path, *, overwrite: bool, nbytes: int) -> Iterator[Path]:
    """Give a temporary folder that becomes ``out`` when the block ends, and vanishes if the block raises.

    An interrupted process that could not clean up leaves ``.NAME.incomplete`` behind, which the next one replaces.

    Args:
        out: The folder to write. An empty one may exist.
        overwrite: Replace a folder that holds a model.
        nbytes: Bytes that will be written.

    Raises:
        FewbitsError: If ``out`` exists and may not be replaced, or the disk has not the room.
        OSError: If it cannot be written.
    """
    _refuse_to_replace(out, overwrite)
    out.parent.mkdir(parents=True, exist_ok=True)
    _refuse_full_disk(out, nbytes)
    staging = out.parent / f".{out.name}.incomplete"
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir()
    try:
        yield staging
        _swap(staging, out)
    except BaseException as error:
        shutil.rmtree(staging, ignore_errors=True)
        if isinstance(error, OSError) and error.errno and error.filename is None:  # a full disk names none
            error.filename = os.fspath(out)
        raise


def _refuse_to_replace(out: Path, overwrite: bool) -> None:
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


def _refuse_full_disk(out: Path, nbytes: int) -> None:
    free = shutil.disk_usage(out.parent).free
    if nbytes > free:
        raise FewbitsError(
            f"{out}: {nbytes / 1e9:.2f} GB are needed and {free / 1e9:.2f} GB are free on its disk; "
            "free some or give a folder on another disk"
        )


def _swap(staging: Path, out: Path) -> None:
    """Put the new folder in the place of the old one; the old one is gone only when the new one stands."""
    old = out.parent / f".{out.name}.replaced"
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
