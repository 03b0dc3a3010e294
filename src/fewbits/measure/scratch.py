"""A temporary file of tensors: for what is too large to be held beside a model.

It has no buffer of its own: what was written is the system's, which keeps it in memory while there is room.
"""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from dataclasses import dataclass
from typing import IO

import torch
from torch import Tensor

from fewbits.errors import FewbitsError

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_REMEDY = "set TMPDIR to a folder with more room, or measure fewer windows"


@dataclass(frozen=True)
class Kept:
    """A tensor in the file."""

    offset: int
    shape: torch.Size
    dtype: torch.dtype


class Scratch:
    """Tensors in a file that has no name, and goes away with `close` or with the process."""

    def __init__(self, what: str) -> None:
        """Open it.

        Args:
            what: what will be in it, for messages: "the reference's log-probabilities".
        """
        self._what, self._folder = what, roomy_folder()
        self._end = 0
        self._file: IO[bytes] = tempfile.TemporaryFile(dir=self._folder, buffering=0)  # noqa: SIM115 - see close

    def check_room(self, nbytes: int) -> None:
        """Look for room before the work.

        Raises:
            FewbitsError: there is too little.
        """
        free = shutil.disk_usage(self._folder).free
        if nbytes > free:
            raise FewbitsError(f"{self._what} take {nbytes:,} bytes, and {self._folder} has {free:,} free: {_REMEDY}")

    def add(self, tensor: Tensor) -> Kept:
        """Write a tensor at the end.

        Raises:
            FewbitsError: the disk became full.
        """
        kept = Kept(self._end, tensor.shape, tensor.dtype)
        data = tensor.contiguous().cpu().numpy().data.cast("B")
        self._file.seek(self._end)
        try:
            while data:
                data = data[self._file.write(data) :]  # a system may take less at once: Linux 2 GiB
        except OSError as error:
            if error.errno not in _FULL:
                raise
            raise FewbitsError(f"{self._folder} became full while {self._what} were written: {_REMEDY}") from None
        self._end = self._file.tell()
        return kept

    def read(self, kept: Kept) -> Tensor:
        """A tensor that was added."""
        data = bytearray(kept.shape.numel() * kept.dtype.itemsize)
        rest = memoryview(data)
        self._file.seek(kept.offset)
        while rest:
            rest = rest[self._file.readinto(rest) :]  # type: ignore[attr-defined] # IO[bytes] leaves readinto out
        return torch.frombuffer(data, dtype=kept.dtype).view(kept.shape)

    def close(self) -> None:
        """Give it back."""
        self._file.close()


def roomy_folder() -> str:
    """Where large temporary files go: what TMPDIR says, or /var/tmp, since /tmp is often a part of the memory."""
    large = "/var/tmp"  # by the Filesystem Hierarchy Standard the one for large files
    given = any(os.environ.get(name) for name in ("TMPDIR", "TEMP", "TMP"))
    return large if not given and os.access(large, os.W_OK) else tempfile.gettempdir()
