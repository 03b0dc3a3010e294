"""A folder of PyTorch `.bin` files as a source: one file, or an index and its shards, beside a `config.json`.

Such a file is a pickle, which could run any code. Only torch's restricted reader (`weights_only`) ever sees it, and
that refuses whatever does not build tensors. `pickle_header` finds where they lie; their numbers are then read there.
"""

from pathlib import Path

import torch

from fewbits.models.folder import ModelFolder, read_at, read_shards
from fewbits.models.pickle_header import PickledTensor, load_pickle, read_pickle_header
from fewbits.models.safetensors_header import DTYPES

SINGLE = "pytorch_model.bin"
INDEX = "pytorch_model.bin.index.json"


def holds_pickles(folder: Path) -> bool:
    """Whether the folder's weights are `.bin` files that a `TorchFolder` reads."""
    return (folder / SINGLE).is_file() or (folder / INDEX).is_file()


class TorchFolder(ModelFolder[PickledTensor]):
    """A folder with `.bin` files, opened: pickles and index checked, weights read on demand. See `source.Source`.

    One tensor is in memory at a time. Files older than torch 1.6 (no zip archives) are the exception: a whole one is
    held from the first tensor that is read of it until the next file's turn.
    """

    def __init__(self, path: Path, *, trust_remote_code: bool = False) -> None:
        super().__init__(path, _read_headers(path), trust_remote_code=trust_remote_code)
        self._old: tuple[Path, dict[str, torch.Tensor]] | None = None  # the file that is held, and its tensors

    def read(self, name: str) -> torch.Tensor:
        """One tensor in its stored dtype, contiguous, sharing nothing. See `source.Source.read`."""
        tensor = self._find(name)
        return self._read(name, tensor, 0, tensor.shape)

    def read_rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Rows `start` to `stop` of dimension 0. See `source.Source.read_rows`."""
        tensor = self._find_rows(name, start, stop)
        return self._read(name, tensor, start, (stop - start, *tensor.shape[1:]))

    def _read(self, name: str, tensor: PickledTensor, first: int, shape: tuple[int, ...]) -> torch.Tensor:
        if tensor.offset is None:
            whole = self._hold(tensor.path)[name].detach()
            return _copy(whole.narrow(0, first, shape[0]) if shape else whole)
        dtype = DTYPES[tensor.stored_as]
        if 0 in shape:
            return torch.empty(shape, dtype=dtype)
        offset = tensor.offset + (first * tensor.strides[0] * dtype.itemsize if shape else 0)
        # A view may skip elements or repeat them: what lies between its first and its last is read.
        span = 1 + sum((size - 1) * stride for size, stride in zip(shape, tensor.strides, strict=True))
        elements = read_at(tensor.path, name, offset, (span,), dtype)
        view = elements.as_strided(shape, tensor.strides)
        return view if view.is_contiguous() else _copy(view)

    def _hold(self, path: Path) -> dict[str, torch.Tensor]:
        if self._old is None or self._old[0] != path:
            self._old = None  # before the next one comes
            self._old = path, load_pickle(path)
        return self._old[1]


def _copy(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.clone(memory_format=torch.contiguous_format)


def _read_headers(folder: Path) -> dict[str, PickledTensor]:
    if (folder / SINGLE).is_file():
        return read_pickle_header(folder / SINGLE)
    return read_shards(folder / INDEX, ".bin", read_pickle_header)
