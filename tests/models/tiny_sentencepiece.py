"""A small sentencepiece model of byte pairs, written field by field, without the sentencepiece package."""

import struct
from collections.abc import Iterable
from pathlib import Path

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, BYTE = 1, 2, 3, 4, 6
WORDS = ("hello", "▁hello", "▁world", "▁wor", "▁people", "▁what", "▁▁▁▁", "aaa", "你好", "▁你好", "世界", "▁sop")


def write_sentencepiece(
    path: Path,
    *,
    symbols: Iterable[str] = (),
    kind: int = USER_DEFINED,
    dummy_prefix: bool = True,
    algorithm: int = 2,
) -> list[str]:
    """Write a `tokenizer.model`; `symbols` take the ids from 3 on. Returns the pieces in the order of their ids."""
    pieces = [("<unk>", 0.0, UNKNOWN), ("<s>", 0.0, CONTROL), ("</s>", 0.0, CONTROL)]
    pieces += [(symbol, 0.0, kind) for symbol in symbols]
    pieces += [(f"<0x{byte:02X}>", 0.0, BYTE) for byte in range(256)]
    texts = dict.fromkeys(word[:end] for word in WORDS for end in range(2, len(word) + 1))
    texts |= dict.fromkeys("▁abcdefghijklmnopqrstuvwxyz<>|/_?.0123456789你好世界:：")
    pieces += [(text, -float(rank), NORMAL) for rank, text in enumerate(texts)]
    message = b"".join(_bytes(1, _bytes(1, t.encode()) + b"\x15" + struct.pack("<f", s) + _number(3, k))
                       for t, s, k in pieces)  # fmt: skip
    trainer = _number(3, algorithm) + _number(4, len(pieces)) + _number(35, 1)
    normalizer = _bytes(1, b"identity") + _number(3, dummy_prefix) + _number(4, 0)
    path.write_bytes(message + _bytes(2, trainer) + _bytes(3, normalizer))
    return [text for text, _, _ in pieces]


def _varint(value: int) -> bytes:
    result = b""
    while value > 0x7F:
        result += bytes([value & 0x7F | 0x80])
        value >>= 7
    return result + bytes([value])


def _number(field: int, value: int) -> bytes:
    return _varint(field << 3) + _varint(int(value))


def _bytes(field: int, value: bytes) -> bytes:
    return _varint(field << 3 | 2) + _varint(len(value)) + value
