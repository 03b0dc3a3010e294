"""Where a model comes from: a GGUF file, a folder with weights, or the Hub. Each is a stream of named tensors."""

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedTokenizerBase

from fewbits.errors import FewbitsError


@dataclass(frozen=True)
class StoredTensor:
    """One tensor as it lies on disk.

    `name` is the Hugging Face parameter name; `stored_as` is the file's own type name: `F32`, `BF16`, `I8` …
    (safetensors), `Q4_1`, `Q8_0`, `F16` … (GGUF); `nbytes` counts the bytes in the file.
    """

    name: str
    shape: tuple[int, ...]
    stored_as: str
    nbytes: int


class Source(Protocol):
    """A model on disk: its configuration, and its tensors one at a time."""

    @property
    def path(self) -> Path:
        """The folder, or the `.gguf` file."""

    @property
    def size(self) -> int:
        """Bytes on disk of the weights: every shard, or the whole GGUF file."""

    @property
    def config(self) -> PreTrainedConfig:
        """The model's configuration; its `dtype` is the model's nominal one."""

    @property
    def tensors(self) -> dict[str, StoredTensor]:
        """The tensors by Hugging Face parameter name, in file order."""

    def read(self, name: str) -> torch.Tensor:
        """One tensor in its stored dtype; block-quantized GGUF types as float32.

        Raises:
            FewbitsError: No tensor of that name, or the file is shorter than its header says.
        """

    def read_rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Rows `start` to `stop` of dimension 0, without reading the others.

        Raises:
            FewbitsError: As `read`, or the rows do not exist.
        """

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The model's tokenizer, with its special tokens and chat template.

        Raises:
            FewbitsError: There is none, or transformers cannot build it.
        """

    def generation_config(self) -> GenerationConfig | None:
        """How the model wants to be sampled, or None where nothing is said."""


def open_source(
    model: str | os.PathLike[str],
    *,
    revision: str | None = None,
    trust_remote_code: bool = False,
    subfolder: str = "",
    **hub_options: Any,
) -> Source:
    """Open a model wherever it is; nothing is read but headers.

    Args:
        model: A `.gguf` file, a folder with `config.json` and safetensors (one file, or an index and its shards; or
            such `pytorch_model.bin` files where there are no safetensors), or a Hub id such as `Qwen/Qwen3-0.6B`
            (downloaded into the Hugging Face cache, or found there when offline).
        revision: Branch, tag or commit of a Hub id; unused for a path.
        trust_remote_code: Let transformers run the Python files of the model's own that its configuration or tokenizer
            asks for; pickles are not run even then.
        subfolder: The folder within a Hub repository, or within a folder, that holds the model.
        hub_options: For a Hub id: `cache_dir`, `force_download`, `local_files_only`, `token`.

    Raises:
        FewbitsError: No such path, no weights in it, a truncated or corrupt file, an architecture that is not read, or
            a Hub id that cannot be fetched.
    """
    path = Path(model).expanduser()
    if not os.fspath(model):  # which as a path would be the current folder
        raise FewbitsError(
            "the model's name is empty; give a .gguf file, a folder with safetensors, or a Hub id (owner/name)"
        )
    if path.is_file():
        return _open_file(path)
    if path.is_dir():
        return _open_folder(path / subfolder, trust_remote_code)
    if not is_hub_id(os.fspath(model)):
        raise FewbitsError(
            f"no such file or folder: {path}; give a .gguf file, a folder with safetensors, or a Hub id (owner/name)"
        )
    from fewbits.models.hub import fetch_model  # imported here: only a Hub id needs the network client

    options = {"revision": revision, "trust_remote_code": trust_remote_code, "subfolder": subfolder, **hub_options}
    folder = fetch_model(os.fspath(model), **options)
    return _open_folder(folder, trust_remote_code)


def _open_file(path: Path) -> Source:
    from fewbits.models.gguf_file import GgufFile  # imported here: the gguf package is needed for GGUF files only

    with path.open("rb") as file:
        magic = file.read(4)
    if path.suffix == ".gguf" or magic == b"GGUF":
        return GgufFile(path)
    raise FewbitsError(f"{path} is not a GGUF file; give a .gguf file, or the folder that holds the safetensors")


def _open_folder(path: Path, trust_remote_code: bool) -> Source:
    from fewbits.models.adapters.families import adapted
    from fewbits.models.safetensors_folder import SafetensorsFolder, holds_safetensors
    from fewbits.models.torch_folder import TorchFolder, holds_pickles

    pickled = holds_pickles(path) and not holds_safetensors(path)
    folder = (TorchFolder if pickled else SafetensorsFolder)(path, trust_remote_code=trust_remote_code)
    return adapted(folder)


def is_hub_id(model: str) -> bool:
    """Whether `model` can be meant as `name` or `owner/name`, and not as a path that does not exist."""
    return re.fullmatch(r"(\w[\w.-]*/)?\w[\w.-]*", model) is not None and not model.endswith((".gguf", ".safetensors"))
