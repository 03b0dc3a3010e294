"""Parse the header of a GGUF file, every count, length and offset checked against the file.

    magic "GGUF" | u32 version | u64 tensors | u64 keys | keys … | tensor table … | padding | tensor data …

`gguf.GGUFReader` makes several arrays of every string and takes seconds for a vocabulary; here an array of strings is
walked once and decoded when asked for. Source: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, section
"File structure".
"""

import math
import mmap
import struct
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

from fewbits.errors import FewbitsError
from fewbits.models.gguf_header import DAMAGED, GgufHeader, GgufTensor, StringArray

_U32 = struct.Struct("<I")
_U64 = struct.Struct("<Q")
# Fixed-size metadata types, by id: u8 i8 u16 i16 u32 i32 f32 bool, u64 i64 f64. Strings and arrays are variable.
_SCALARS = {
    **dict(enumerate(np.dtype(code) for code in ("u1", "i1", "<u2", "<i2", "<u4", "<i4", "<f4", "?"))),
    **dict(enumerate((np.dtype(code) for code in ("<u8", "<i8", "<f8")), start=10)),
}
_STRING, _ARRAY = 8, 9
_VERSIONS = (2, 3)  # 1 had 32-bit counts and is gone from the wild
_DEFAULT_ALIGNMENT = 32  # bytes
_MAX_DIMENSIONS = 4  # GGML_MAX_DIMS
_SMALLEST_KEY = 8 + 4 + 1  # bytes: an empty name, a type, a u8
_SMALLEST_TENSOR = 8 + 4 + 8 + 4 + 8  # bytes: an empty name, one dimension, a type, an offset


def read_gguf_header(path: Path) -> GgufHeader:
    """Parse and check the header of a GGUF file, reading none of its weights.

    Raises:
        FewbitsError: Not a GGUF file, a version that is not read, or a count, length, type or offset that the file
            cannot hold. The message names the file and the byte.
        OSError: The file cannot be opened.
    """
    size = path.stat().st_size
    if size < 24:
        raise FewbitsError(f"{path}: {size} bytes are too few for a GGUF header (24 bytes); {DAMAGED}")
    # Mapped, because how long the header is shows only while reading it; unmapped again before this returns.
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        return _Parser(path, data, size).header()


class _Parser:
    """A position in the file, and one method for each thing that can stand there."""

    def __init__(self, path: Path, data: mmap.mmap, size: int) -> None:
        self.path, self.data, self.size, self.position = path, data, size, 0

    def header(self) -> GgufHeader:
        self.check_magic()
        tensor_count = self.count("tensors", _SMALLEST_TENSOR)
        key_count = self.count("metadata keys", _SMALLEST_KEY)
        metadata: dict[str, Any] = {}
        for _ in range(key_count):
            start = self.position
            key = self.string("a metadata key")
            if key in metadata:
                self.fail(start, f"metadata key {key!r} appears twice")
            metadata[key] = self.value(key)
        alignment = self.alignment(metadata)
        table = [self.tensor_entry() for _ in range(tensor_count)]
        data_start = math.ceil(self.position / alignment) * alignment
        return GgufHeader(self.path, self.size, metadata, self.place(table, data_start, alignment))

    def check_magic(self) -> None:
        if (magic := self.take(4, "the magic")) != b"GGUF":
            raise FewbitsError(f"{self.path}: starts with {magic!r}, not b'GGUF'; this is not a GGUF file")
        version = self.u32("the version")
        if version in _VERSIONS:
            return
        if int.from_bytes(version.to_bytes(4, "little"), "big") in _VERSIONS:
            self.fail(4, "a big-endian GGUF, which is not read", "convert the model again on a little-endian machine")
        self.fail(4, f"GGUF version {version} is not read (2 and 3 are)", "convert the model again with llama.cpp")

    def fail(self, offset: int, message: str, remedy: str = DAMAGED) -> NoReturn:
        raise FewbitsError(f"{self.path}: byte {offset}: {message}; {remedy}")

    def take(self, length: int, what: str) -> bytes:
        start, end = self.position, self.position + length
        if end > self.size:
            self.fail(start, f"{what} needs {length} bytes, but the file ends at byte {self.size}")
        self.position = end
        return self.data[start:end]

    def u32(self, what: str) -> int:
        return int(_U32.unpack(self.take(4, what))[0])

    def u64(self, what: str) -> int:
        return int(_U64.unpack(self.take(8, what))[0])

    def count(self, what: str, smallest: int) -> int:
        """A count of items of at least `smallest` bytes each: no more than the rest of the file can hold."""
        start = self.position
        count = self.u64(f"the count of {what}")
        if count * smallest > self.size - self.position:
            self.fail(start, f"{count} {what} cannot fit in the {self.size - self.position} bytes that follow")
        return count

    def string(self, what: str) -> str:
        start = self.position
        raw = self.take(self.u64(f"the length of {what}"), what)
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError:
            self.fail(start, f"{what} is not UTF-8")

    def value(self, key: str) -> Any:
        start = self.position
        kind = self.u32(f"the type of {key!r}")
        if (dtype := _SCALARS.get(kind)) is not None:
            return np.frombuffer(self.take(dtype.itemsize, repr(key)), dtype)[0].item()
        if kind == _STRING:
            return self.string(f"the value of {key!r}")
        if kind != _ARRAY:
            self.fail(start, f"metadata key {key!r} has the unknown type {kind}")
        return self.array(key)

    def array(self, key: str) -> "np.ndarray[Any, Any] | StringArray":
        start = self.position
        kind = self.u32(f"the element type of {key!r}")
        what = f"elements of {key!r}"
        if (dtype := _SCALARS.get(kind)) is not None:
            count = self.count(what, dtype.itemsize)
            return np.frombuffer(self.take(count * dtype.itemsize, what), dtype)
        if kind != _STRING:
            self.fail(start, f"metadata key {key!r} is an array of elements of type {kind}, which is not read")
        count = self.count(what, 8)
        start = self.position
        self.skip_strings(count, what)
        return StringArray(self.path, start, count, self.data[start : self.position])

    def skip_strings(self, count: int, what: str) -> None:
        data, position, last = self.data, self.position, self.size - 8
        unpack = _U64.unpack_from
        for _ in range(count):  # the one loop that runs 10⁵ times: no method calls
            if position > last:
                break
            position += 8 + unpack(data, position)[0]
        else:
            if position <= self.size:
                self.position = position
                return
        self.fail(self.position, f"{count} {what} run past the end of the file at byte {self.size}")

    def alignment(self, metadata: dict[str, Any]) -> int:
        alignment = metadata.get("general.alignment", _DEFAULT_ALIGNMENT)
        if type(alignment) is not int or alignment < 1 or alignment & (alignment - 1):
            self.fail(self.position, f"general.alignment is {alignment!r}, not a power of two")
        return alignment

    def tensor_entry(self) -> tuple[int, GgufTensor]:
        """One row of the tensor table, and the byte where it stands; `offset` is still relative to the data."""
        start = self.position
        name = self.string("a tensor name")
        dimensions = self.u32(f"the number of dimensions of {name!r}")
        if not 1 <= dimensions <= _MAX_DIMENSIONS:
            self.fail(start, f"tensor {name!r} has {dimensions} dimensions, not 1 to {_MAX_DIMENSIONS}")
        # ggml counts dimensions from the innermost, torch from the outermost
        shape = tuple(reversed([self.u64(f"the shape of {name!r}") for _ in range(dimensions)]))
        kind, offset = self.u32(f"the type of {name!r}"), self.u64(f"the offset of {name!r}")
        try:
            kind = GGMLQuantizationType(kind)
        except ValueError:
            self.fail(start, f"tensor {name!r} has the unknown type {kind}", "upgrade the gguf package")
        block, block_bytes = GGML_QUANT_SIZES[kind]
        if not all(shape) or shape[-1] % block:
            self.fail(start, f"tensor {name!r} of shape {list(shape)} is not made of {kind.name} blocks of {block}")
        return start, GgufTensor(name, shape, kind, offset, math.prod(shape) // block * block_bytes)

    def place(self, table: list[tuple[int, GgufTensor]], data_start: int, alignment: int) -> dict[str, GgufTensor]:
        """The tensors by name with offsets from the start of the file: aligned, inside the file, and disjoint."""
        tensors: dict[str, GgufTensor] = {}
        for start, entry in table:
            if entry.name in tensors:
                self.fail(start, f"tensor {entry.name!r} appears twice")
            if entry.offset % alignment:
                self.fail(start, f"tensor {entry.name!r} has offset {entry.offset}, not a multiple of {alignment}")
            offset = data_start + entry.offset
            if offset + entry.nbytes > self.size:
                self.fail(
                    start,
                    f"tensor {entry.name!r} lies at bytes {offset} to {offset + entry.nbytes}, "
                    f"but the file ends at byte {self.size}",
                )
            tensors[entry.name] = GgufTensor(entry.name, entry.shape, entry.type, offset, entry.nbytes)
        self.check_disjoint(tensors, {entry.name: start for start, entry in table})
        return tensors

    def check_disjoint(self, tensors: dict[str, GgufTensor], starts: dict[str, int]) -> None:
        end, before = 0, ""
        for tensor in sorted(tensors.values(), key=lambda tensor: tensor.offset):
            if tensor.offset < end:
                self.fail(starts[tensor.name], f"tensor {tensor.name!r} overlaps tensor {before!r}")
            end, before = tensor.offset + tensor.nbytes, tensor.name
