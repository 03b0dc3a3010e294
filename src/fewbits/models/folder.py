"""What every folder with a model has, whatever holds its weights: configuration, tokenizer, shards, offsets."""

import json
import re
from collections.abc import Callable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

import torch
from transformers import AutoConfig, AutoTokenizer, GenerationConfig, PreTrainedConfig, PreTrainedTokenizerBase

from fewbits.errors import FewbitsError
from fewbits.models.source import StoredTensor

_T = TypeVar("_T")


class PlacedTensor(Protocol):
    """A tensor and the file that it lies in."""

    @property
    def path(self) -> Path:
        """The file."""

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape."""

    @property
    def stored_as(self) -> str:
        """The name of its type. See `source.StoredTensor`."""

    @property
    def nbytes(self) -> int:
        """Bytes of its elements."""


Placed = TypeVar("Placed", bound=PlacedTensor)


class ModelFolder(Generic[Placed]):
    """A folder with a `config.json` and weights; a subclass reads the weights. See `source.Source`.

    Args:
        path: The folder.
        stored: Its tensors by name, in file order.
        trust_remote_code: Let transformers run the Python files that the configuration or tokenizer asks for.

    Raises:
        FewbitsError: There is no tensor.
    """

    def __init__(self, path: Path, stored: Mapping[str, Placed], *, trust_remote_code: bool = False) -> None:
        if not stored:
            raise FewbitsError(f"{path}: its weights hold no tensor; fetch the model again")
        self.path = path
        self.size = sum(file.stat().st_size for file in {tensor.path for tensor in stored.values()})
        self._stored = stored
        self._trust_remote_code = trust_remote_code

    @cached_property
    def config(self) -> PreTrainedConfig:
        """The configuration in `config.json`, as transformers reads it.

        Raises:
            FewbitsError: There is none, it is not JSON, transformers does not know its `model_type`, or it asks for
                code that is not trusted.
        """
        if not (self.path / "config.json").is_file():
            raise FewbitsError(f"{self.path}: has no config.json; copy it from where the weights came from")
        trust = self._trust_remote_code
        return self._ask(lambda: AutoConfig.from_pretrained(self.path, trust_remote_code=trust), "config.json")

    @cached_property
    def tensors(self) -> dict[str, StoredTensor]:
        """The tensors by the names in the files, shard after shard, in file order."""
        return {
            name: StoredTensor(name, tensor.shape, tensor.stored_as, tensor.nbytes)
            for name, tensor in self._stored.items()
        }

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer beside the weights. See `source.Source.tokenizer`."""
        config, trust = self.config, self._trust_remote_code
        return self._ask(
            lambda: AutoTokenizer.from_pretrained(self.path, config=config, trust_remote_code=trust), "tokenizer"
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
            if "trust_remote_code" in message and not self._trust_remote_code:
                raise FewbitsError(
                    f"{self.path}: its {what} asks for code of the model's own to be run, which is not done unasked; "
                    "if you have read that code, pass trust_remote_code=True"
                ) from error
            raise FewbitsError(f"{self.path}: transformers cannot read its {what}: {message}") from error

    def _find(self, name: str) -> Placed:
        if name not in self._stored:
            raise FewbitsError(f"{self.path}: has no tensor {name!r}")
        return self._stored[name]

    def _find_rows(self, name: str, start: int, stop: int) -> Placed:
        tensor = self._find(name)
        rows = tensor.shape[0] if tensor.shape else 0
        if not 0 <= start <= stop <= rows:
            raise FewbitsError(f"{self.path}: rows {start} to {stop} of {name} do not exist: it has {rows}")
        return tensor


def read_at(path: Path, name: str, offset: int, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """The elements that lie at a byte of a file, one after another; `name` is for the message.

    Raises:
        FewbitsError: The file ends before they do.
    """
    result = torch.empty(shape, dtype=dtype)
    raw = result.view(-1).view(torch.uint8).numpy() if result.numel() else None
    with path.open("rb", buffering=0) as file:
        file.seek(offset)
        done = 0
        while raw is not None and done < raw.nbytes:  # one read returns 2 GiB at most
            count = file.readinto(raw[done:].data)
            if not count:
                raise FewbitsError(
                    f"{path}: ends inside tensor {name!r} at byte {offset + done}; "
                    "it was cut off after it was opened: fetch it again"
                )
            done += count
    return result


def read_shards(index: Path, suffix: str, read: Callable[[Path], Mapping[str, Placed]]) -> dict[str, Placed]:
    """The tensors of every shard that an index names.

    Args:
        index: The file; the shards lie beside it.
        suffix: How their names must end.
        read: Gives the tensors of one shard.

    Raises:
        FewbitsError: The index is none, names a shard that is not there or a file elsewhere, does not agree with the
            shards, or two of them hold a tensor of one name.
    """
    weight_map = _read_index(index, suffix)
    tensors: dict[str, Placed] = {}
    for shard in dict.fromkeys(weight_map.values()):
        if not index.with_name(shard).is_file():
            raise FewbitsError(f"{index}: names the shard {shard!r}, which is missing: fetch it")
        for name, tensor in read(index.with_name(shard)).items():
            if name in tensors:
                raise FewbitsError(f"{index.parent}: tensor {name!r} is in {tensors[name].path.name} and in {shard}")
            tensors[name] = tensor
    for name, shard in weight_map.items():
        if name not in tensors or tensors[name].path.name != shard:
            raise FewbitsError(f"{index}: tensor {name!r} is not in its shard {shard}; fetch both again")
    if unlisted := [name for name in tensors if name not in weight_map]:
        shard = tensors[unlisted[0]].path.name
        raise FewbitsError(f"{index}: does not list tensor {unlisted[0]!r} of {shard}; fetch both again")
    return tensors


def _read_index(path: Path, suffix: str) -> dict[str, str]:
    """The index's map from tensor to shard; a shard is a file name, so that no index can point out of its folder."""
    try:
        index: Any = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise FewbitsError(f"{path}: byte {getattr(error, 'pos', 0)}: is not JSON ({error}); fetch it again") from error
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise FewbitsError(f"{path}: has no weight_map from tensors to shards; fetch it again")
    for name, shard in weight_map.items():
        if not isinstance(shard, str) or re.fullmatch(rf"[^/\\\0]+{re.escape(suffix)}", shard) is None:
            raise FewbitsError(
                f"{path}: tensor {name!r} lies in {shard!r}, which is not the name of a {suffix} file beside it; "
                "fetch the model again"
            )
    return weight_map
