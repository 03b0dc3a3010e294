"""A sentencepiece `tokenizer.model`, read without the sentencepiece package: its pieces and what is done to text.

The file is one protocol buffer message. Fields are named by number in
https://github.com/google/sentencepiece/blob/master/src/sentencepiece_model.proto, as are the defaults.
"""

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path

from fewbits.errors import FewbitsError

BYTE_PAIRS = 2  # TrainerSpec.ModelType.BPE
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5  # wire types


class Kind(IntEnum):
    """What a piece is: `ModelProto.SentencePiece.Type`."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3  # never found in text
    USER_DEFINED = 4  # always found in text, as a whole
    UNUSED = 5
    BYTE = 6  # stands for one byte of a character that has no piece


@dataclass(frozen=True)
class Piece:
    """One entry of the vocabulary; pieces of higher score are merged first."""

    text: str
    score: float
    kind: Kind


@dataclass(frozen=True)
class SentencePieceModel:
    """A vocabulary in the order of its ids, and how text is normalized before it is cut."""

    path: Path
    pieces: tuple[Piece, ...]
    algorithm: int
    byte_fallback: bool
    charsmap: bytes
    dummy_prefix: bool
    remove_extra_whitespaces: bool


def read_sentencepiece_model(path: Path) -> SentencePieceModel:
    """Read a `tokenizer.model`.

    Raises:
        FewbitsError: It is missing, or no sentencepiece model.
    """
    if not path.is_file():
        raise FewbitsError(f"{path.parent}: has no {path.name}; copy it from where the weights came from")
    try:
        return _parse(path, path.read_bytes())
    except (IndexError, KeyError, TypeError, ValueError, struct.error) as error:
        raise FewbitsError(f"{path}: is not a sentencepiece model; fetch it again") from error


def _parse(path: Path, message: bytes) -> SentencePieceModel:
    pieces: list[Piece] = []
    trainer: dict[int, int | bytes] = {}
    normalizer: dict[int, int | bytes] = {}
    for number, value in _fields(message):
        if number == 1:
            pieces.append(_piece(dict(_fields(_bytes(value)))))
        elif number == 2:
            trainer = dict(_fields(_bytes(value)))
        elif number == 3:
            normalizer = dict(_fields(_bytes(value)))
    if not pieces:
        raise ValueError("no pieces")
    return SentencePieceModel(
        path,
        tuple(pieces),
        algorithm=int(trainer.get(3, 1)),
        byte_fallback=bool(trainer.get(35, 0)),
        charsmap=_bytes(normalizer.get(2, b"")),
        dummy_prefix=bool(normalizer.get(3, 1)),
        remove_extra_whitespaces=bool(normalizer.get(4, 1)),
    )


def _piece(fields: dict[int, int | bytes]) -> Piece:
    (score,) = struct.unpack("<f", _bytes(fields.get(2, bytes(4))))
    return Piece(_bytes(fields[1]).decode(), score, Kind(int(fields.get(3, Kind.NORMAL))))


def _bytes(value: int | bytes) -> bytes:
    if isinstance(value, int):
        raise ValueError("a number where bytes belong")
    return value


def _fields(message: bytes) -> Iterator[tuple[int, int | bytes]]:
    """The fields of a message as (number, value); numbers of a fixed size are left as bytes."""
    at = 0
    while at < len(message):
        key, at = _varint(message, at)
        number, wire = key >> 3, key & 7
        if wire == _VARINT:
            value, at = _varint(message, at)
            yield number, value
            continue
        if wire == _BYTES:
            size, at = _varint(message, at)
        elif wire in (_FIXED64, _FIXED32):
            size = 8 if wire == _FIXED64 else 4
        else:
            raise ValueError(f"wire type {wire}")
        if at + size > len(message):
            raise ValueError("cut off")
        yield number, message[at : at + size]
        at += size


def _varint(message: bytes, at: int) -> tuple[int, int]:
    """A number in groups of seven bits, the lowest first; the top bit says that another follows."""
    result = shift = 0
    while True:
        byte = message[at]
        at += 1
        result |= (byte & 0x7F) << shift
        if byte < 0x80:
            return result, at
        shift += 7
