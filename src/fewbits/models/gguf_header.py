"""What a GGUF file says before its weights: metadata by key, and where each tensor lies."""

import math
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from gguf import GGMLQuantizationType

from fewbits.errors import FewbitsError

DAMAGED = "the file is truncated or corrupt: fetch it again"
_U64 = struct.Struct("<Q")


@dataclass(frozen=True)
class GgufTensor:
    """Where one tensor lies: `shape` in torch's order (rows first), `offset` in bytes from the start of the file."""

    name: str
    shape: tuple[int, ...]
    type: GGMLQuantizationType
    offset: int
    nbytes: int


class StringArray:
    """An array of strings as it lies in the file, decoded by `decode` only: a vocabulary is megabytes."""

    def __init__(self, path: Path, offset: int, count: int, raw: bytes) -> None:
        self._path, self._offset, self._count, self._raw = path, offset, count, raw

    def __len__(self) -> int:
        return self._count

    def decode(self) -> list[str]:
        """The strings.

        Raises:
            FewbitsError: A string is not UTF-8.
        """
        try:
            return [str(text, "utf-8") for text in self._pieces()]
        except UnicodeDecodeError as error:
            raise FewbitsError(
                f"{self._path}: the array of strings at byte {self._offset} holds one that is not UTF-8; {DAMAGED}"
            ) from error

    def _pieces(self) -> Iterator[bytes]:
        position, raw = 0, self._raw
        for _ in range(self._count):
            (length,) = _U64.unpack_from(raw, position)
            yield raw[position + 8 : position + 8 + length]
            position += 8 + length


@dataclass(frozen=True)
class GgufHeader:
    """Everything in a GGUF file but the weights.

    `metadata` maps a key to an int, float, bool, str, numpy array of numbers, or `StringArray`; `tensors` are by GGUF
    name, in file order; `size` is the whole file in bytes.
    """

    path: Path
    size: int
    metadata: dict[str, Any]
    tensors: dict[str, GgufTensor]

    def whole(self, key: str, default: int | None = None) -> int:
        """The positive whole number of a metadata key, or `default` where the key is absent.

        Raises:
            FewbitsError: It is something else (for instance an array, one number per layer), or absent without default.
        """
        value = self.metadata.get(key, default)
        if type(value) is not int or value < 1:
            self._refuse(key, value, "a positive whole number")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """The positive finite number of a metadata key, or `default` where the key is absent.

        Raises:
            FewbitsError: It is something else, or absent without default.
        """
        value = self.metadata.get(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
            self._refuse(key, value, "a positive number")
        return float(value)

    def index(self, key: str) -> int | None:
        """The whole number, zero or more, of a metadata key such as a token's; None where the key is absent.

        Raises:
            FewbitsError: It is something else.
        """
        value = self.metadata.get(key)
        if value is not None and (type(value) is not int or value < 0):
            self._refuse(key, value, "a whole number")
        return value

    def text(self, key: str, default: str | None = None) -> str:
        """The text of a metadata key, or `default` where the key is absent.

        Raises:
            FewbitsError: It is something else, or absent without default.
        """
        value = self.metadata.get(key, default)
        if not isinstance(value, str):
            self._refuse(key, value, "text")
        return value

    def _refuse(self, key: str, value: Any, wanted: str) -> NoReturn:
        shown = f"{len(value)} values" if isinstance(value, np.ndarray | StringArray) else repr(value)
        shown = "absent" if value is None else shown
        raise FewbitsError(
            f"{self.path}: metadata key {key} is {shown}, not {wanted}; convert the model again with llama.cpp"
        )
