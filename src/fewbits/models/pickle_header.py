"""Where the tensors of a PyTorch `.bin` file lie, found without running its pickle and without reading its numbers.

    zip archive, not compressed:  archive/data.pkl  the pickle: names, shapes, strides, which storage
                                  archive/data/0    the bytes of storage 0; several tensors may share it
                                  …
    before torch 1.6:             pickles, then the storages one after another; these are read whole (`load_pickle`)

Source: https://docs.pytorch.org/docs/stable/notes/serialization.html.
"""

import math
import re
import struct
import warnings
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fewbits.errors import FewbitsError
from fewbits.models.safetensors_header import DTYPES

_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_WRAPPERS = ("state_dict", "model", "module")  # where training scripts put the tensors beside what else they save
_LOCAL_HEADER = 30  # bytes before the name of a record of a zip archive; its two lengths are at byte 26
_DAMAGED = "the file is truncated or corrupt: fetch it again"


@dataclass(frozen=True)
class PickledTensor:
    """Where one tensor lies.

    Its first element is at byte `offset` of the file `path` (None: the file is not an archive), the others by
    `strides`, in elements. `stored_as` is safetensors' name of the dtype; `nbytes` counts the elements, shared or not.
    """

    path: Path
    shape: tuple[int, ...]
    stored_as: str
    nbytes: int
    offset: int | None
    strides: tuple[int, ...]


def read_pickle_header(path: Path) -> dict[str, PickledTensor]:
    """Find the tensors of a `.bin` file, in the order of its pickle; no code of the file is run.

    Tensors are taken from the dictionary that the file holds, or from its only entry `state_dict`, `model` or `module`
    where it has no tensors itself. Entries that hold no tensors (the epoch, say) are left out.

    Raises:
        FewbitsError: The pickle asks for more than tensors, or holds them in another way; a tensor is sparse,
            quantized or of a dtype that is not read; the file does not hold what its pickle says.
        OSError: The file cannot be opened.
    """
    records = _records(path)
    with torch.serialization.skip_data():
        tensors = _load(path, "meta")
    return {name: _placed(path, name, tensor, records) for name, tensor in tensors.items()}


def load_pickle(path: Path) -> dict[str, torch.Tensor]:
    """All tensors of a `.bin` file in memory. As `read_pickle_header`."""
    return _load(path, "cpu")


def _records(path: Path) -> dict[int, int] | None:
    """Of an archive, where the bytes of each storage begin and how many there are; None: the file is no archive."""
    with path.open("rb") as file:
        if file.read(4) != b"PK\3\4":
            return None
        try:
            infos = zipfile.ZipFile(file).infolist()
        except (zipfile.BadZipFile, ValueError, NotImplementedError) as error:
            raise FewbitsError(f"{path}: is no zip archive ({error}); {_DAMAGED}") from error
        if any(info.filename.endswith("/constants.pkl") for info in infos):
            raise FewbitsError(f"{path}: is a TorchScript program, not weights; save the model's state_dict() instead")
        records = {}
        for info in infos:
            if "/data/" not in info.filename:
                continue
            if info.compress_type != zipfile.ZIP_STORED:
                raise FewbitsError(f"{path}: {info.filename} is compressed, as torch.save never does; {_DAMAGED}")
            file.seek(max(info.header_offset, 0))
            header = file.read(_LOCAL_HEADER)
            if info.header_offset < 0 or len(header) < _LOCAL_HEADER:
                raise FewbitsError(f"{path}: {info.filename} lies outside of the file; {_DAMAGED}")
            records[info.header_offset + _LOCAL_HEADER + sum(struct.unpack("<HH", header[26:]))] = info.file_size
        return records


def _load(path: Path, device: str) -> dict[str, torch.Tensor]:
    try:
        with warnings.catch_warnings(action="ignore"):  # of pickle protocols; what matters is raised
            loaded = torch.load(path, map_location=device, weights_only=True)
    except OSError:
        raise
    except Exception as error:  # a broken pickle makes its reader stumble over anything
        raise FewbitsError(f"{path}: {_why_refused(error)}") from error
    return _tensors(path, loaded)


def _why_refused(error: Exception) -> str:
    """One line of torch's many; some of them recommend to run the pickle, which is not passed on."""
    text = str(error)
    if match := re.search(r"GLOBAL (\S+)|function <[\w-]+ [\w-]+ (\S+)>", text):
        wanted = (match[1] or match[2]).removesuffix(".")
        return (
            f"this pickle asks for {wanted}, which builds no tensor and could run code; nothing of it was run. Take "
            "the model's safetensors, or ask its author for them"
        )
    reason = text.rpartition("WeightsUnpickler error: ")[2].split("\n")[0].split(". ")[0].strip()
    return f"torch cannot read this pickle ({reason or type(error).__name__}); {_DAMAGED}"


def _tensors(path: Path, loaded: Any) -> dict[str, torch.Tensor]:
    if isinstance(loaded, dict) and not any(isinstance(value, torch.Tensor) for value in loaded.values()):
        inner = [loaded[key] for key in _WRAPPERS if isinstance(loaded.get(key), dict)]
        loaded = inner[0] if len(inner) == 1 else loaded
    if not isinstance(loaded, dict):
        kind = type(loaded).__name__
        raise FewbitsError(f"{path}: holds a {kind}, not tensors by name; save the model's state_dict() instead")
    tensors = {}
    for name, value in loaded.items():
        if _holds_tensors(value) or (isinstance(value, torch.Tensor) and not isinstance(name, str)):
            raise FewbitsError(
                f"{path}: entry {name!r} is a {type(value).__name__}, and only tensors by name are read; save the "
                "model's state_dict() by itself"
            )
        if isinstance(value, torch.Tensor):
            tensors[name] = value
    return tensors


def _holds_tensors(value: Any, depth: int = 4) -> bool:
    """Whether a container holds tensors, some levels down; a pickle can make one that holds itself."""
    values = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
    return depth > 0 and any(isinstance(one, torch.Tensor) or _holds_tensors(one, depth - 1) for one in values)


def _placed(path: Path, name: str, tensor: torch.Tensor, records: dict[int, int] | None) -> PickledTensor:
    plain = tensor.layout == torch.strided and not tensor.is_quantized and not tensor.is_conj() and not tensor.is_neg()
    if not plain or tensor.dtype not in _NAMES:
        kind = tensor.dtype if plain or tensor.is_quantized else tensor.layout
        raise FewbitsError(f"{path}: tensor {name!r} is {kind}, which is not read; save it as plain numbers")
    shape, strides, size = tuple(tensor.shape), tensor.stride(), tensor.dtype.itemsize
    nbytes = math.prod(shape) * size
    offset = None
    if records is not None:
        begin = getattr(tensor.untyped_storage(), "_checkpoint_offset", None)
        span = 1 + sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True)) if nbytes else 0
        if begin not in records or (tensor.storage_offset() + span) * size > records[begin]:
            raise FewbitsError(f"{path}: tensor {name!r} lies outside of the bytes stored for it; {_DAMAGED}")
        offset = begin + tensor.storage_offset() * size
    if nbytes > path.stat().st_size:  # a view can repeat its elements: few bytes in the file, no end of them in memory
        raise FewbitsError(f"{path}: tensor {name!r} would be {nbytes} bytes, more than the whole file; {_DAMAGED}")
    return PickledTensor(path, shape, _NAMES[tensor.dtype], nbytes, offset, strides)
