"""Write a safetensors file one tensor at a time: the header comes first, from declared dtypes and shapes."""

import json
import math
import os
from collections.abc import Iterable, Set
from pathlib import Path
from types import TracebackType
from typing import Self

import torch

from fewbits.errors import FewbitsError
from fewbits.models.resumable import Resumable
from fewbits.models.safetensors_header import DTYPES

_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_HEADER_ALIGNMENT = 8  # bytes: the header is padded with spaces, so that the data begins aligned


class SafetensorsWriter:
    """A safetensors file being written; a context manager.

    Every tensor has its place from the start, so tensors may come in any order and none is held back. In the file they
    are ordered by element size, widest first (as the safetensors package does): each is then aligned to its elements.
    The file is flushed to the disk when the block ends, and removed when the block raises, unless that is Ctrl-C and a
    later run can go on.

    Args:
        path: The file to write; it must not exist yet, unless the record speaks of it.
        tensors: Name, dtype and shape of every tensor that will come, the ones that are there already too.
        record: What is done of the folder that `path` lies in; tensors of steps that are done do not come again.

    Raises:
        FewbitsError: A name is declared twice, a dtype that safetensors has no name for, `path` exists; on `write`, a
            tensor that was not declared so or came already; at the end of the block, a tensor that never came.
        OSError: The file cannot be written, for instance because the disk is full.
    """

    def __init__(
        self,
        path: Path,
        tensors: Iterable[tuple[str, torch.dtype, tuple[int, ...]]],
        record: Resumable | None = None,
    ) -> None:
        self.path = path
        self._record = record
        self._declared: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
        for name, dtype, shape in tensors:
            if name in self._declared or name == "__metadata__":
                raise FewbitsError(f"{path}: tensor {name!r} cannot be declared twice, nor be named __metadata__")
            if dtype not in _NAMES:
                raise FewbitsError(f"{path}: tensor {name!r} is {dtype}, which safetensors cannot hold; cast it first")
            self._declared[name] = dtype, tuple(shape)
        self._places: dict[str, int] = {}  # offset from the start of the file, bytes
        self._missing = set(self._declared)

    def __enter__(self) -> Self:
        header = self._layout()
        there = self._parts_of_an_earlier_run(header)
        try:
            self._file = self.path.open("r+b" if there else "xb", buffering=0)
        except FileExistsError as error:
            raise FewbitsError(f"{self.path} exists already; remove it or choose another name") from error
        self._missing -= there
        try:
            if self._record is not None:
                self._record.opened(self.path.name, self._file.fileno())
            if not there:
                self._write_all(memoryview(header))
        except BaseException:
            self._discard()
            raise
        return self

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """Write one tensor at its place; it must have the declared dtype and shape, on any device."""
        if name not in self._missing:
            state = "was written already" if name in self._declared else "was not declared"
            raise FewbitsError(f"{self.path}: tensor {name!r} {state}")
        dtype, shape = self._declared[name]
        if tensor.dtype != dtype or tuple(tensor.shape) != shape:
            raise FewbitsError(
                f"{self.path}: tensor {name!r} was declared {dtype} {list(shape)}, but is {tensor.dtype} "
                f"{list(tensor.shape)}"
            )
        self._file.seek(self._places[name])
        if tensor.numel():
            self._write_all(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
        self._missing.remove(name)
        if self._record is not None:
            self._record.wrote(self.path.name, name, tensor.nbytes)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if kind is not None and (self._record is None or not issubclass(kind, KeyboardInterrupt)):
            self._discard()
            return
        try:
            if kind is None and self._missing:
                name = next(name for name in self._declared if name in self._missing)
                raise FewbitsError(f"{self.path}: tensor {name!r} was declared but never written")
            self._flush()
            self._close()
        except BaseException:
            self._discard()
            raise

    def _layout(self) -> bytes:
        """Give every tensor its place, and return the header that says so."""
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        end = 0
        places = {}
        for name, (dtype, shape) in sorted(self._declared.items(), key=lambda item: -item[1][0].itemsize):
            begin, end = end, end + math.prod(shape) * dtype.itemsize
            header[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [begin, end]}
            places[name] = begin
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        text += b" " * (-len(text) % _HEADER_ALIGNMENT)
        self._places = {name: 8 + len(text) + begin for name, begin in places.items()}
        return len(text).to_bytes(8, "little") + text

    def _parts_of_an_earlier_run(self, header: bytes) -> Set[str]:
        """The tensors that are there, by the record; none where the file is not what the record speaks of."""
        there = self._record.parts(self.path.name) if self._record is not None else set()
        if self._record is None or not there:
            return there
        if self.path.is_file() and there <= self._missing:
            with self.path.open("rb") as file:
                same = file.read(len(header)) == header
            if same and self.path.stat().st_size >= max(map(self._end, there)):
                return there
        self._record.forget(self.path.name)
        self.path.unlink(missing_ok=True)
        return set()

    def _end(self, name: str) -> int:
        dtype, shape = self._declared[name]
        return self._places[name] + math.prod(shape) * dtype.itemsize

    def _flush(self) -> None:
        if self._record is not None:
            self._record.flush()  # which flushes the data first
        os.fsync(self._file.fileno())

    def _close(self) -> None:
        if self._record is not None:
            self._record.closed(self.path.name)
        self._file.close()

    def _write_all(self, data: memoryview) -> None:
        while data:  # a raw file may write a part only: at most 2 GiB, or what the disk still holds
            data = data[self._file.write(data) :]

    def _discard(self) -> None:
        self._close()
        self.path.unlink(missing_ok=True)
