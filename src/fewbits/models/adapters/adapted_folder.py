"""A folder whose checkpoint is presented as a model that transformers carries: other names, fused tensors in parts."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedTokenizerBase

from fewbits.errors import FewbitsError
from fewbits.models.source import Source, StoredTensor

RowsOf = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Layout:
    """Where a family keeps what transformers looks for.

    Attributes:
        parts: For each stored tensor, the parameters in it, in order, and their rows; 0 stands for all rows, where a
            tensor is one parameter.
        dropped: Ends of the names of stored tensors that are no parameters.
        change: What is done to a parameter's rows; each row by itself, so that parts of it can be read.
    """

    parts: Mapping[str, Mapping[str, int]]
    dropped: tuple[str, ...] = ()
    change: Mapping[str, RowsOf] | None = None


@dataclass(frozen=True)
class _Rows:
    """Rows of a stored tensor."""

    stored: str
    start: int
    count: int


class AdaptedFolder:
    """A family's checkpoint under transformers' names; rows are read, never a whole fused tensor. See `source.Source`.

    Args:
        raw: The folder under its own names.
        config: The configuration of the model that it is presented as.
        layout: Where its tensors are.
        tokenizer: Builds the tokenizer.
        generation_config: Says how the family wants to be sampled.

    Raises:
        FewbitsError: A tensor is missing, or a fused one has not the rows of its parts.
    """

    auto_model_has_head = True  # `AutoModel` gives the model with its language head, as the families' own code does

    def __init__(
        self,
        raw: Source,
        config: PreTrainedConfig,
        layout: Layout,
        tokenizer: Callable[[], PreTrainedTokenizerBase],
        generation_config: Callable[[], GenerationConfig | None],
    ) -> None:
        self.path: Path = raw.path
        self.size: int = raw.size
        self.config = config
        self._raw = raw
        self._layout = layout
        self._tokenizer = tokenizer
        self._generation_config = generation_config
        self._rows = _locate(raw, layout)

    @cached_property
    def tensors(self) -> dict[str, StoredTensor]:
        """The tensors by transformers' names, in file order; a fused tensor's parts follow one another."""
        stored = self._raw.tensors
        result = {}
        for name, rows in self._rows.items():
            whole = stored[rows.stored]
            shape = (rows.count, *whole.shape[1:]) if whole.shape else ()
            nbytes = whole.nbytes // max(whole.shape[0], 1) * rows.count if whole.shape else whole.nbytes
            result[name] = StoredTensor(name, shape, whole.stored_as, nbytes)
        return result

    def read(self, name: str) -> torch.Tensor:
        """One tensor in its stored dtype. See `source.Source.read`."""
        tensor = self._find(name)
        if not self.tensors[name].shape:
            return self._raw.read(tensor.stored)
        return self.read_rows(name, 0, tensor.count)

    def read_rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Rows `start` to `stop` of dimension 0. See `source.Source.read_rows`."""
        rows = self._find(name)
        if not 0 <= start <= stop <= rows.count:
            raise FewbitsError(f"{self.path}: rows {start} to {stop} of {name} do not exist: it has {rows.count}")
        tensor = self._raw.read_rows(rows.stored, rows.start + start, rows.start + stop)
        change = (self._layout.change or {}).get(name)
        return change(tensor) if change else tensor

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The family's tokenizer. See `source.Source.tokenizer`."""
        return self._tokenizer()

    def generation_config(self) -> GenerationConfig | None:
        """How the family wants to be sampled, and what ends its turn."""
        return self._generation_config()

    def _find(self, name: str) -> _Rows:
        if name not in self._rows:
            raise FewbitsError(f"{self.path}: has no tensor {name!r}")
        return self._rows[name]


def _locate(raw: Source, layout: Layout) -> dict[str, _Rows]:
    """The rows of every parameter, in file order; a tensor that the family does not know keeps its name."""
    if missing := [stored for stored in layout.parts if stored not in raw.tensors]:
        raise FewbitsError(
            f"{raw.path}: {len(missing)} tensors that its config.json asks for are not in the checkpoint, such as "
            f"{missing[0]!r}; fetch the model again"
        )
    rows: dict[str, _Rows] = {}
    for stored, tensor in raw.tensors.items():
        if stored.endswith(layout.dropped):
            continue
        parts = layout.parts.get(stored, {stored: 0})
        first = tensor.shape[0] if tensor.shape else 0
        if len(parts) > 1 and first != sum(parts.values()):
            shares = ", ".join(f"{count} of {name}" for name, count in parts.items())
            raise FewbitsError(
                f"{raw.path}: {stored} has {first} rows, but config.json asks for {sum(parts.values())} ({shares}); "
                "fetch both again"
            )
        start = 0
        for name, count in parts.items():
            rows[name] = _Rows(stored, start, count or first)
            start += count
    return rows
