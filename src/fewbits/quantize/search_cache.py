"""Where searches keep what they measured, and the quantized layers of the last model, in a folder for each model."""

from __future__ import annotations

import os
import sys
from pathlib import Path

if sys.platform != "win32":
    import fcntl


def cache_folder() -> Path:
    """Where searches keep what they measured: ``search`` in ``$FEWBITS_CACHE``, or in ``~/.cache/fewbits``."""
    return Path(os.environ.get("FEWBITS_CACHE") or Path.home() / ".cache" / "fewbits") / "search"


def forget_others(folder: Path) -> None:
    """Remove the quantized layers that searches of other models or settings kept: they are as large as models.

    Those of a search that is going on stay.
    """
    for other in folder.parent.iterdir():
        if other == folder or not any(other.glob("block-*")):
            continue
        held = hold(other, alone=True)
        if held is not None:
            for file in other.glob("block-*"):
                file.unlink(missing_ok=True)
            os.close(held)


def hold(folder: Path, *, alone: bool = False) -> int | None:
    """Hold a folder's lock, alone or beside others who use it; the descriptor, or None if it cannot be had."""
    descriptor = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
    if sys.platform == "win32":  # where open files cannot be removed
        return descriptor
    try:
        fcntl.flock(descriptor, (fcntl.LOCK_EX if alone else fcntl.LOCK_SH) | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        return None
    return descriptor
