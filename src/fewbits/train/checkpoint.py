"""Checkpoints of a run: folders beside its output, each written whole or not at all, the newest one kept.

OUT.checkpoints/step-00000040/state.pt      weights, masters, moments, scale, random state, place in the text
"""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fewbits.errors import FewbitsError
from fewbits.models.staging import staged_folder

_FILE = "state.pt"


class Checkpoints:
    """Those of one output folder.

    Args:
        out: The folder that the trained model will be written to.
    """

    def __init__(self, out: Path) -> None:
        self.folder = out.parent / f"{out.name}.checkpoints"

    def newest(self) -> int | None:
        """The step of the newest whole checkpoint; None if there is none."""
        return max(self._steps(), default=None)

    def read(self, step: int) -> dict[str, Any]:
        """What was written; tensors stay in the file until they are used.

        Raises:
            FewbitsError: It cannot be read.
        """
        path = self._path(step) / _FILE
        try:
            state = torch.load(path, weights_only=True, map_location="cpu", mmap=True)
        except Exception as error:  # of what torch.load raises there is no list
            raise FewbitsError(
                f"the checkpoint {path} cannot be read ({type(error).__name__}); remove {self.folder} and begin anew"
            ) from None
        if not isinstance(state, dict) or state.get("version") != 1:
            raise FewbitsError(
                f"the checkpoint {path} is not of this version of fewbits; remove {self.folder} and begin anew"
            )
        return state

    def write(self, step: int, state: dict[str, Any]) -> None:
        """Write a checkpoint, then remove the older ones.

        Raises:
            FewbitsError: The disk has not the room.
            OSError: It cannot be written.
        """
        older = self._steps()
        with staged_folder(self._path(step), overwrite=False, nbytes=_nbytes(state)) as folder:
            with (folder / _FILE).open("wb") as file:
                torch.save({"version": 1, **state}, file)
                file.flush()
                os.fsync(file.fileno())
            _flush_folder(folder)
        _flush_folder(self.folder)  # the new one is on the disk before an old one goes
        for old in older:
            shutil.rmtree(self._path(old), ignore_errors=True)

    def clear_leftovers(self) -> None:
        """Remove what a kill has left half written."""
        for path in self.folder.glob(".step-*"):
            shutil.rmtree(path, ignore_errors=True)

    def remove(self) -> None:
        """Remove all checkpoints; the folder stays, which its lock is on."""
        for path in [*self.folder.glob("step-*"), *self.folder.glob(".step-*")]:
            shutil.rmtree(path)

    def _path(self, step: int) -> Path:
        return self.folder / f"step-{step:08d}"

    def _steps(self) -> list[int]:
        if not self.folder.is_dir():
            return []
        names = [path.parent.name.removeprefix("step-") for path in self.folder.glob(f"step-*/{_FILE}")]
        return [int(name) for name in names if name.isdecimal()]


def _nbytes(state: Any) -> int:
    if isinstance(state, Tensor):
        return state.nbytes
    values = state.values() if isinstance(state, dict) else state if isinstance(state, list | tuple) else ()
    return sum(_nbytes(value) for value in values)


def _flush_folder(folder: Path) -> None:
    """Names in a folder survive a power failure only once the folder itself is flushed."""
    if sys.platform == "win32":  # has no such thing
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
