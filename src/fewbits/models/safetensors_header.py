"""The header of a safetensors file: where each tensor lies, checked against the file.

    u64 length of the header | JSON {name: {dtype, shape, data_offsets}} | tensor data, without holes

Weights are then read at their offsets: the safetensors package maps the file, and mapped pages count as the process's
memory. Source: https://github.com/huggingface/safetensors#format.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch

from fewbits.errors import FewbitsError

# The format's names of what torch calls a dtype.
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "C64": torch.complex64,
}
_LONGEST_HEADER = 100_000_000  # bytes: the limit of the safetensors package
_DAMAGED = "the file is truncated or corrupt: fetch it again"


@dataclass(frozen=True)
class SafetensorsTensor:
    """Where one tensor lies: `offset` and `nbytes` in bytes, from the start of the file `path`."""

    path: Path
    shape: tuple[int, ...]
    stored_as: str
    offset: int
    nbytes: int


def read_safetensors_header(path: Path) -> dict[str, SafetensorsTensor]:
    """Parse and check the header of a safetensors file; the tensors come in the order in which they lie in the file.

    Raises:
        FewbitsError: Not a safetensors file, or a header that does not fit the file. The message names the file and the
            byte (of the header for a header that is no JSON, of the tensor where its data does not fit).
        OSError: The file cannot be opened.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        length = int.from_bytes(start, "little")
        if len(start) < 8 or length > min(size - 8, _LONGEST_HEADER):
            raise FewbitsError(
                f"{path}: byte 0: a header of {length} bytes does not fit in a file of {size} bytes (limit "
                f"{_LONGEST_HEADER}); {_DAMAGED}"
            )
        raw = file.read(length)
    try:
        entries = json.loads(raw, object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        _fail(path, 8 + getattr(error, "pos", 0), f"the header is not JSON ({error})")
    if not isinstance(entries, dict):
        _fail(path, 8, "the header is not a JSON object")
    entries.pop("__metadata__", None)
    tensors = {name: _entry(path, name, entry, 8 + length) for name, entry in entries.items()}
    return _in_file_order(path, tensors, 8 + length, size)


def _fail(path: Path, offset: int, message: str) -> NoReturn:
    raise FewbitsError(f"{path}: byte {offset}: {message}; {_DAMAGED}")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(name for name in names if names.count(name) > 1)!r} appears twice")
    return result


def _entry(path: Path, name: str, entry: Any, data_start: int) -> SafetensorsTensor:
    match entry:
        case {"dtype": str(dtype), "shape": list(shape), "data_offsets": [int(begin), int(end)]}:
            pass
        case _:
            _fail(path, 8, f"tensor {name!r} has no dtype, shape and data_offsets")
    if dtype not in DTYPES:
        raise FewbitsError(f"{path}: tensor {name!r} has dtype {dtype!r}, which is not read ({', '.join(DTYPES)} are)")
    if not all(type(size) is int and size >= 0 for size in shape) or math.prod(size or 1 for size in shape) >= 2**63:
        _fail(path, 8, f"tensor {name!r} has shape {shape}")  # nor could torch count it, even without an element
    nbytes = math.prod(shape) * DTYPES[dtype].itemsize
    if not 0 <= begin <= end or end - begin != nbytes:
        _fail(path, 8, f"tensor {name!r}, {dtype} of shape {shape}, is {nbytes} bytes, not bytes {begin} to {end}")
    return SafetensorsTensor(path, tuple(shape), dtype, data_start + begin, nbytes)


def _in_file_order(
    path: Path, tensors: dict[str, SafetensorsTensor], data_start: int, size: int
) -> dict[str, SafetensorsTensor]:
    """The tensors by offset: each begins where the one before ends, and the last ends with the file."""
    ordered = dict(sorted(tensors.items(), key=lambda item: (item[1].offset, item[1].nbytes)))
    end = data_start
    for name, tensor in ordered.items():
        if tensor.offset != end:
            _fail(path, end, f"tensor {name!r} begins at byte {tensor.offset}, not where the one before it ends")
        end += tensor.nbytes
        if end > size:
            _fail(path, size, f"the file ends inside tensor {name!r} (bytes {tensor.offset} to {end})")
    if end != size:
        _fail(path, end, f"{size - end} bytes follow the last tensor")
    return ordered
