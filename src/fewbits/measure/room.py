"""Temporary files that may be large: where they go, and what is said when there is no more room."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from typing import IO

from torch import Tensor

from fewbits.errors import FewbitsError

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def roomy_folder() -> str:
    """Where they go: what TMPDIR says, or /var/tmp, since /tmp is often a part of the memory."""
    large = "/var/tmp"  # by the Filesystem Hierarchy Standard the one for large files
    given = any(os.environ.get(name) for name in ("TMPDIR", "TEMP", "TMP"))
    return large if not given and os.access(large, os.W_OK) else tempfile.gettempdir()


def check_room(nbytes: int, what: str) -> None:
    """Look for room before the work.

    Raises:
        FewbitsError: there is too little.
    """
    free = shutil.disk_usage(roomy_folder()).free
    if nbytes > free:
        raise FewbitsError(f"{what} take {nbytes:,} bytes, and {roomy_folder()} has {free:,} free: {_REMEDY}")


def write(file: IO[bytes], tensor: Tensor, what: str) -> None:
    """Add a tensor, contiguous and on the CPU, to a file.

    Raises:
        FewbitsError: the disk became full.
    """
    try:
        file.write(tensor.numpy().data)
        file.flush()
    except OSError as error:
        if error.errno not in _FULL:
            raise
        raise FewbitsError(f"{roomy_folder()} became full while {what} were written: {_REMEDY}") from None


_REMEDY = "set TMPDIR to a folder with more room, or measure fewer windows"
