"""A folder of safetensors as a source: one file, or an index and its shards, beside a `config.json`."""

import json
import re
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import torch
from transformers import AutoConfig, AutoTokenizer, GenerationConfig, PreTrainedConfig, PreTrainedTokenizerBase

from fewbits.errors import FewbitsError
from fewbits.models.safetensors_header import DTYPES, SafetensorsTensor, read_safetensors_header
from fewbits.models.source import StoredTensor

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
_PICKLES = ("*.bin", "*.pth", "*.pt", "*.ckpt")
_T = TypeVar("_T")


class SafetensorsFolder:
    """A folder with safetensors, opened: headers and index checked, weights read on demand. See `source.Source`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._stored = _read_headers(path)
        if not self._stored:
            raise FewbitsError(f"{path}: its weights hold no tensor; fetch the model again")
        self.size = sum(file.stat().st_size for file in {tensor.path for tensor in self._stored.values()})

    @cached_property
    def config(self) -> PreTrainedConfig:
        """The configuration in `config.json`, as transformers reads it; no remote code is run.

        Raises:
            FewbitsError: There is none, it is not JSON, or transformers does not know its `model_type`.
        """
        if not (self.path / "config.json").is_file():
            raise FewbitsError(f"{self.path}: has no config.json; copy it from where the weights came from")
        return self._ask(lambda: AutoConfig.from_pretrained(self.path, trust_remote_code=False), "config.json")

    @cached_property
    def tensors(self) -> dict[str, StoredTensor]:
        """The tensors by the names in the files, shard after shard, in file order."""
        return {
            name: StoredTensor(name, tensor.shape, tensor.stored_as, tensor.nbytes)
            for name, tensor in self._stored.items()
        }

    def read(self, name: str) -> torch.Tensor:
        """One tensor in its stored dtype. See `source.Source.read`."""
        tensor = self._find(name)
        return self._read(name, tensor, tensor.offset, tensor.shape)

    def read_rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Rows `start` to `stop` of dimension 0. See `source.Source.read_rows`."""
        tensor = self._find(name)
        rows = tensor.shape[0] if tensor.shape else 0
        if not 0 <= start <= stop <= rows:
            raise FewbitsError(f"{self.path}: rows {start} to {stop} of {name} do not exist: it has {rows}")
        offset = tensor.offset + start * (tensor.nbytes // max(rows, 1))
        return self._read(name, tensor, offset, (stop - start, *tensor.shape[1:]))

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer beside the weights. See `source.Source.tokenizer`."""
        config = self.config
        return self._ask(
            lambda: AutoTokenizer.from_pretrained(self.path, config=config, trust_remote_code=False), "tokenizer"
        )

    def generation_config(self) -> GenerationConfig | None:
        """What `generation_config.json` says, or None where there is no such file."""
        if not (self.path / "generation_config.json").is_file():
            return None
        return self._ask(lambda: GenerationConfig.from_pretrained(self.path), "generation_config.json")

    def _ask(self, load: Callable[[], _T], what: str) -> _T:
        try:
            return load()
        except Exception as error:  # transformers raises whatever the file makes it stumble over
            message = " ".join(str(error).split())
            raise FewbitsError(f"{self.path}: transformers cannot read its {what}: {message}") from error

    def _find(self, name: str) -> SafetensorsTensor:
        if name not in self._stored:
            raise FewbitsError(f"{self.path}: has no tensor {name!r}")
        return self._stored[name]

    def _read(self, name: str, tensor: SafetensorsTensor, offset: int, shape: tuple[int, ...]) -> torch.Tensor:
        dtype = DTYPES[tensor.stored_as]
        result = torch.empty(shape, dtype=dtype)
        raw = result.view(-1).view(torch.uint8).numpy() if result.numel() else None
        with tensor.path.open("rb", buffering=0) as file:
            file.seek(offset)
            done = 0
            while raw is not None and done < raw.nbytes:  # one read returns 2 GiB at most
                count = file.readinto(raw[done:].data)
                if not count:
                    raise FewbitsError(
                        f"{tensor.path}: ends inside tensor {name!r} at byte {offset + done}; "
                        "it was cut off after it was opened: fetch it again"
                    )
                done += count
        return result


def _read_headers(folder: Path) -> dict[str, SafetensorsTensor]:
    """Every tensor of the folder: of `model.safetensors`, or of the shards that the index names."""
    if (folder / SINGLE).is_file():
        return read_safetensors_header(folder / SINGLE)
    if not (folder / INDEX).is_file():
        raise FewbitsError(f"{folder}: holds no weights ({SINGLE} or {INDEX}); {_remedy(folder)}")
    weight_map = _read_index(folder / INDEX)
    tensors: dict[str, SafetensorsTensor] = {}
    for shard in dict.fromkeys(weight_map.values()):
        if not (folder / shard).is_file():
            raise FewbitsError(f"{folder / INDEX}: names the shard {shard!r}, which is missing: fetch it")
        for name, tensor in read_safetensors_header(folder / shard).items():
            if name in tensors:
                raise FewbitsError(f"{folder}: tensor {name!r} is in {tensors[name].path.name} and in {shard}")
            tensors[name] = tensor
    for name, shard in weight_map.items():
        if name not in tensors or tensors[name].path.name != shard:
            raise FewbitsError(f"{folder / INDEX}: tensor {name!r} is not in its shard {shard}; fetch both again")
    if unlisted := [name for name in tensors if name not in weight_map]:
        shard = tensors[unlisted[0]].path.name
        raise FewbitsError(f"{folder / INDEX}: does not list tensor {unlisted[0]!r} of {shard}; fetch both again")
    return tensors


def _read_index(path: Path) -> dict[str, str]:
    """The index's map from tensor to shard; a shard is a file name, so that no index can point out of its folder."""
    try:
        index: Any = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise FewbitsError(f"{path}: byte {getattr(error, 'pos', 0)}: is not JSON ({error}); fetch it again") from error
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise FewbitsError(f"{path}: has no weight_map from tensors to shards; fetch it again")
    for name, shard in weight_map.items():
        if not isinstance(shard, str) or re.fullmatch(r"[^/\\\0]+\.safetensors", shard) is None:
            raise FewbitsError(
                f"{path}: tensor {name!r} lies in {shard!r}, which is not the name of a .safetensors file beside it; "
                "fetch the model again"
            )
    return weight_map


def _remedy(folder: Path) -> str:
    """What to do about a folder without weights, by what is there instead."""
    if ggufs := sorted(folder.glob("*.gguf")):
        return f"give the GGUF file itself: {ggufs[0]}"
    if others := sorted(folder.glob("*.safetensors")):
        return f"{others[0].name} is there, but no index: fetch {INDEX} too, or rename a single file to {SINGLE}"
    if pickles := [file for pattern in _PICKLES for file in sorted(folder.glob(pattern))]:
        return (
            f"{pickles[0].name} is a pickle, which is not read yet: load the model with transformers and "
            "save_pretrained it, which writes safetensors"
        )
    return "give a folder with safetensors, a .gguf file, or a Hub id (owner/name)"
