"""A folder of safetensors as a source: one file, or an index and its shards, beside a `config.json`."""

from pathlib import Path

import torch

from fewbits.errors import FewbitsError
from fewbits.models.folder import ModelFolder, read_at, read_shards
from fewbits.models.safetensors_header import DTYPES, SafetensorsTensor, read_safetensors_header

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
_PICKLES = ("*.bin", "*.pth", "*.pt", "*.ckpt")


def holds_safetensors(folder: Path) -> bool:
    """Whether the folder's weights are safetensors that a `SafetensorsFolder` reads."""
    return (folder / SINGLE).is_file() or (folder / INDEX).is_file()


class SafetensorsFolder(ModelFolder[SafetensorsTensor]):
    """A folder with safetensors, opened: headers and index checked, weights read on demand. See `source.Source`."""

    def __init__(self, path: Path, *, trust_remote_code: bool = False) -> None:
        super().__init__(path, _read_headers(path), trust_remote_code=trust_remote_code)

    def read(self, name: str) -> torch.Tensor:
        """One tensor in its stored dtype. See `source.Source.read`."""
        tensor = self._find(name)
        return read_at(tensor.path, name, tensor.offset, tensor.shape, DTYPES[tensor.stored_as])

    def read_rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Rows `start` to `stop` of dimension 0. See `source.Source.read_rows`."""
        tensor = self._find_rows(name, start, stop)
        offset = tensor.offset + start * (tensor.nbytes // max(tensor.shape[0], 1))
        return read_at(tensor.path, name, offset, (stop - start, *tensor.shape[1:]), DTYPES[tensor.stored_as])


def _read_headers(folder: Path) -> dict[str, SafetensorsTensor]:
    """Every tensor of the folder: of `model.safetensors`, or of the shards that the index names."""
    if (folder / SINGLE).is_file():
        return read_safetensors_header(folder / SINGLE)
    if (folder / INDEX).is_file():
        return read_shards(folder / INDEX, ".safetensors", read_safetensors_header)
    raise FewbitsError(f"{folder}: holds no weights ({SINGLE} or {INDEX}); {_remedy(folder)}")


def _remedy(folder: Path) -> str:
    """What to do about a folder without weights, by what is there instead."""
    if ggufs := sorted(folder.glob("*.gguf")):
        return f"give the GGUF file itself: {ggufs[0]}"
    if others := sorted(folder.glob("*.safetensors")):
        return f"{others[0].name} is there, but no index: fetch {INDEX} too, or rename a single file to {SINGLE}"
    if pickles := [file for pattern in _PICKLES for file in sorted(folder.glob(pattern))]:
        return (
            f"{pickles[0].name} is there, but pickles are read as pytorch_model.bin, or as shards that "
            "pytorch_model.bin.index.json names: fetch that, or rename a single file"
        )
    return "give a folder with safetensors, a .gguf file, or a Hub id (owner/name)"
