"""A GGUF file as a source: its tensors under Hugging Face names, dequantized a few rows at a time."""

import math
from collections.abc import Iterator
from functools import cached_property
from io import FileIO
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedTokenizerBase

from fewbits.errors import FewbitsError
from fewbits.models.gguf_config import ARCHITECTURES, gguf_architecture, gguf_config, gguf_names
from fewbits.models.gguf_header import GgufTensor
from fewbits.models.gguf_parser import read_gguf_header
from fewbits.models.gguf_tokenizer import gguf_tokenizer
from fewbits.models.source import StoredTensor

# Types that hold numbers as torch does, read without conversion.
_PLAIN = {
    GGMLQuantizationType.F64: torch.float64,
    GGMLQuantizationType.F32: torch.float32,
    GGMLQuantizationType.F16: torch.float16,
    GGMLQuantizationType.BF16: torch.bfloat16,
    GGMLQuantizationType.I64: torch.int64,
    GGMLQuantizationType.I32: torch.int32,
    GGMLQuantizationType.I16: torch.int16,
    GGMLQuantizationType.I8: torch.int8,
}
# Elements dequantized at once: 256 KiB of float32 and gguf's few temporaries of that size stay in the L2 cache, and the
# allocator reuses them; larger ones it returns to the system and faults in again for every chunk.
_CHUNK = 1 << 16
_Bytes = np.ndarray[Any, np.dtype[np.uint8]]


class GgufFile:
    """A `.gguf` file, opened: header and configuration checked, weights read on demand. See `source.Source`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._header = read_gguf_header(path)
        self.size = self._header.size
        self.config: PreTrainedConfig = gguf_config(self._header)

    @cached_property
    def tensors(self) -> dict[str, StoredTensor]:
        """The tensors by Hugging Face parameter name, in file order."""
        stored = {}
        for name, gguf_name in self._names.items():
            tensor = self._header.tensors[gguf_name]
            self._check_readable(tensor)
            stored[name] = StoredTensor(name, tensor.shape, tensor.type.name, tensor.nbytes)
        return stored

    def read(self, name: str) -> torch.Tensor:
        """One tensor; block types as float32, the rest in their stored dtype. See `source.Source.read`."""
        return self.read_rows(name, 0, self._stored(name).shape[0])

    def read_rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Rows `start` to `stop` of dimension 0. See `source.Source.read_rows`."""
        tensor = self._stored(name)
        if not 0 <= start <= stop <= tensor.shape[0]:
            raise FewbitsError(f"{self.path}: rows {start} to {stop} of {name} do not exist: it has {tensor.shape[0]}")
        plain = _PLAIN.get(tensor.type)
        # numpy throughout: one thread, where torch would wake all of them for every chunk
        result = np.empty((stop - start, *tensor.shape[1:]), _carrier(plain) if plain else np.float32)
        for first, rows in self._chunks(tensor, start, stop):
            # a chunk holds whole heads: it may begin before `start` and end after `stop`
            low, high = max(start, first), min(stop, first + len(rows))
            result[low - start : high - start] = rows[low - first : high - first]
        numbers = torch.from_numpy(result).view(plain or torch.float32)
        offset = ARCHITECTURES[gguf_architecture(self._header)].norm_offset
        return numbers - offset if offset and tensor.name.endswith("_norm.weight") else numbers

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer in the file's metadata. See `source.Source.tokenizer`."""
        return gguf_tokenizer(self._header)

    def generation_config(self) -> GenerationConfig | None:
        """The special tokens that begin, end and pad a text; a turn's end also ends the answer, as in llama.cpp."""
        header = self._header
        end, turn = header.index("tokenizer.ggml.eos_token_id"), header.index("tokenizer.ggml.eot_token_id")
        return GenerationConfig(
            bos_token_id=header.index("tokenizer.ggml.bos_token_id"),
            eos_token_id=end if turn in (None, end) else [end, turn],
            pad_token_id=header.index("tokenizer.ggml.padding_token_id"),
        )

    @cached_property
    def _names(self) -> dict[str, str]:
        return gguf_names(self._header, self.config)

    def _stored(self, name: str) -> GgufTensor:
        if name not in self._names:
            raise FewbitsError(f"{self.path}: has no tensor {name!r}")
        return self._header.tensors[self._names[name]]

    def _check_readable(self, tensor: GgufTensor) -> None:
        if tensor.type in _PLAIN:
            return
        try:
            gguf.dequantize(np.zeros((1, GGML_QUANT_SIZES[tensor.type][1]), np.uint8), tensor.type)
        except NotImplementedError as error:
            raise FewbitsError(
                f"{self.path}: tensor {tensor.name!r} is stored as {tensor.type.name}, which the gguf package cannot "
                "dequantize; use a file in another type"
            ) from error

    def _rows_per_head(self, tensor: GgufTensor) -> int:
        """Rows that are permuted among themselves: the size of a head, or 1 where nothing is permuted."""
        permuted = ARCHITECTURES[gguf_architecture(self._header)].permuted
        if not any(part in tensor.name for part in permuted):
            return 1
        query = ".attn_q." in tensor.name
        heads = self.config.num_attention_heads if query else self.config.num_key_value_heads
        return tensor.shape[0] // int(heads)

    def _chunks(self, tensor: GgufTensor, start: int, stop: int) -> Iterator[tuple[int, np.ndarray[Any, Any]]]:
        """Rows `start` to `stop` as (first row, rows) in Hugging Face's order, whole heads at a time."""
        group = self._rows_per_head(tensor)
        last = -(-stop // group) * group
        # A vector is small, and one block of it spans several rows: it is read whole.
        vector = len(tensor.shape) == 1
        row_elements, row_bytes = math.prod(tensor.shape[1:]), tensor.nbytes // tensor.shape[0]
        step = tensor.shape[0] if vector else max(1, _CHUNK // (row_elements * group)) * group
        with self.path.open("rb", buffering=0) as file:
            for first in range(0 if vector else start // group * group, last, step):
                count = min(step, last - first) if not vector else step
                raw = np.empty(tensor.nbytes if vector else count * row_bytes, np.uint8)
                self._fill(raw, file, tensor, first * row_bytes)
                yield first, _halves(_numbers(raw, tensor.type).reshape(count, *tensor.shape[1:]), group)

    def _fill(self, buffer: _Bytes, file: FileIO, tensor: GgufTensor, offset: int) -> None:
        file.seek(tensor.offset + offset)
        if (length := file.readinto(buffer.data)) < len(buffer):
            raise FewbitsError(
                f"{self.path}: ends inside tensor {tensor.name!r} at byte {tensor.offset + offset + length}; "
                "it was cut off after it was opened: fetch it again"
            )


def _carrier(dtype: torch.dtype) -> np.dtype[Any]:
    """The integers that carry elements of `dtype` through numpy, which has no bfloat16."""
    return np.dtype(f"<i{dtype.itemsize}")


def _numbers(raw: _Bytes, kind: GGMLQuantizationType) -> np.ndarray[Any, Any]:
    """The elements that whole blocks of bytes stand for, in one dimension."""
    if (dtype := _PLAIN.get(kind)) is not None:
        return raw.view(_carrier(dtype))
    # As one long row: gguf splits a matrix into groups of 16 rows, which is slow where rows are short. A scale that is
    # Inf or NaN is the file's own and passes through; numpy would warn about it.
    with np.errstate(all="ignore"):
        return np.asarray(gguf.dequantize(raw.reshape(1, -1), kind)).reshape(-1)


def _halves(rows: np.ndarray[Any, Any], group: int) -> np.ndarray[Any, Any]:
    """Rows of heads from llama.cpp's order (x0 y0 x1 y1 …, rotated in pairs) to Hugging Face's (x0 x1 … y0 y1 …)."""
    if group == 1:
        return rows
    return rows.reshape(-1, group // 2, 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)
