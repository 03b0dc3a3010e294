"""What of a long piece of work is done: a record that survives a kill, so that the next run goes on there.

    {"of": "2f6c…"}                                                         whose work it is: a fingerprint
    {"step": "model.norm.weight", "parts": {"model.safetensors": ["model.norm.weight"]}, "extra": []}
    …                                                                       one line per step, when its data is on disk

A step is what the work does at once, a part what lies in the output for it: a quantized layer is one step, its codes
and its scales are two parts.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Set
from concurrent.futures import Future, ThreadPoolExecutor, wait
from importlib.metadata import version
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from fewbits.models.source import Source

RECORD = ".progress"
"""The record's name, in the folder that is being written."""

# Data is flushed to the disk after so many bytes, or this long after the last time: a kill costs that much at most.
# Flushing more often slows the writing down: what it waits for is on its way to the disk in any case.
_BATCH_BYTES = 1 << 28
_BATCH_SECONDS = 10.0


def fingerprint(source: Source, **options: object) -> str:
    """What a result depends on: the source's files (size, time of change), its tensors, the options and the version."""
    files = sorted(source.path.iterdir()) if source.path.is_dir() else [source.path]
    stats = [(os.fspath(file.absolute()), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    what = [version("fewbits"), stats, [repr(tensor) for tensor in source.tensors.values()], sorted(options.items())]
    return hashlib.sha256(repr(what).encode()).hexdigest()


class Resumable:
    """The record of the work on a folder; a context manager, within the folder's `staged_folder`.

    A line is written only after the data that it speaks of was flushed, so it holds after a power failure too. A thread
    does that while the work goes on.

    Args:
        folder: The folder that is being written.

    Raises:
        OSError: The record cannot be written.
    """

    def __init__(self, folder: Path) -> None:
        self._path = folder / RECORD
        lines = _read(self._path)
        self._head = [line for line in lines if "of" in line]
        self._steps = {line["step"]: line for line in lines if "step" in line}
        self._open_parts: dict[str, list[str]] = {}  # of the step that is under way
        self._pending: list[dict[str, Any]] = []  # steps whose data may not be on the disk yet
        self._pending_bytes = 0
        self._flushed = time.monotonic()
        self._data: dict[str, int] = {}  # descriptors of the files of data
        self._flusher = ThreadPoolExecutor(1, "fewbits-flush")
        self._flush_under_way: Future[None] | None = None

    def __enter__(self) -> Self:
        self._rewrite()  # without a last line that was cut off
        self._file = self._path.open("ab", buffering=0)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._flusher.shutdown()
        self._file.close()

    def done(self, step: str) -> bool:
        """Whether a step was done in an earlier run; then it is left out."""
        return step in self._steps

    def extra(self, step: str) -> Any:
        """What was recorded with a step that is done."""
        return self._steps[step]["extra"]

    def record(self, step: str, extra: Any = None) -> None:
        """Say that a step is done: every part of it was written. `extra` is kept as JSON."""
        self._pending.append({"step": step, "parts": self._open_parts, "extra": extra})
        self._open_parts = {}
        due = self._pending_bytes >= _BATCH_BYTES or time.monotonic() - self._flushed >= _BATCH_SECONDS
        if due and (self._flush_under_way is None or self._flush_under_way.done()):
            self._begin_flush()

    def flush(self) -> None:
        """Flush the data to the disk, then the lines that say so, and wait until they are there."""
        self._wait()
        self._begin_flush()
        self._wait()

    def _begin_flush(self) -> None:
        self._wait()  # raises what the one before it met
        lines = b"".join(_line(step) for step in self._pending)
        self._flush_under_way = self._flusher.submit(self._to_disk, list(self._data.values()), lines)
        self._pending, self._pending_bytes, self._flushed = [], 0, time.monotonic()

    def _to_disk(self, descriptors: list[int], lines: bytes) -> None:
        for descriptor in descriptors:
            os.fsync(descriptor)
        self._file.write(lines)
        os.fsync(self._file.fileno())

    def _wait(self) -> None:
        if self._flush_under_way is not None:
            self._flush_under_way.result()

    # --- for those who write data -------------------------------------------------------------------------------------

    def parts(self, file: str) -> Set[str]:
        """The parts in a file of the folder that are of steps which are done."""
        return {part for step in self._steps.values() for part in step["parts"].get(file, ())}

    def opened(self, file: str, descriptor: int) -> None:
        """Say that a file is written through this descriptor, which stays open until `closed`."""
        self._data[file] = descriptor

    def closed(self, file: str) -> None:
        """Say that a file is about to be closed."""
        if self._flush_under_way is not None:
            wait([self._flush_under_way])
        self._data.pop(file, None)

    def wrote(self, file: str, part: str, nbytes: int) -> None:
        """Say that a part was written, of the step that is recorded next."""
        self._open_parts.setdefault(file, []).append(part)
        self._pending_bytes += nbytes

    def forget(self, file: str) -> None:
        """Strike out the steps with parts in a file, since it is not what was written."""
        self._steps = {name: step for name, step in self._steps.items() if file not in step["parts"]}
        self._file.close()
        self._rewrite()
        self._file = self._path.open("ab", buffering=0)

    def _rewrite(self) -> None:
        self._path.write_bytes(b"".join(_line(line) for line in [*self._head, *self._steps.values()]))


def recorded_fingerprint(folder: Path) -> str | None:
    """Whose work the record in a folder is of; None where there is none."""
    first, *_ = _read(folder / RECORD) or [{}]
    return first.get("of")


def recorded_files(folder: Path) -> set[str]:
    """The files of a folder that hold parts of steps that are done."""
    return {file for line in _read(folder / RECORD) for file in line.get("parts", ())}


def begin_record(folder: Path, of: str) -> None:
    """Begin the record of the work with this fingerprint."""
    (folder / RECORD).write_bytes(_line({"of": of}))


def _line(data: dict[str, Any]) -> bytes:
    return json.dumps(data).encode() + b"\n"


def _read(path: Path) -> list[dict[str, Any]]:
    """The lines as far as they are whole; a kill may have cut the last one off."""
    lines: list[dict[str, Any]] = []
    if not path.is_file():
        return lines
    for line in path.read_bytes().splitlines(keepends=True):
        try:
            data = json.loads(line) if line.endswith(b"\n") else None
        except ValueError:
            data = None
        if not isinstance(data, dict):
            break
        lines.append(data)
    return lines
