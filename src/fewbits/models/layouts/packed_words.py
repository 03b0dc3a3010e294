"""Integer codes in 32-bit words, as compressed-tensors packs them.

Codes are stored as ``code + 2^(bits−1)``, the first one in the lowest bits; rows are filled up to whole words:

    4 bits:  | 7 | 6 | 5 | 4 | 3 | 2 | 1 | 0 |     8 bits:  |   3   |   2   |   1   |   0   |     one word

Little-endian words are the bytes in order, and adding 2^(bits−1) to a two's-complement code flips its highest bit, so
that codes become words without being taken apart.
"""

from __future__ import annotations

import sys

import torch
from torch import Tensor
from torch.nn.functional import pad

_BYTES = 4  # in a word
_FLIP = {8: 0x80, 4: 0x88}  # the highest bit of every code of a byte


def words_in(K: int, bits: int) -> int:
    """How many words a row of K codes fills."""
    return -(-K * bits // (8 * _BYTES))


def pack_words(codes: Tensor, bits: int) -> Tensor:
    """Pack two's-complement codes into int32 words.

    Args:
        codes: int8 ``[..., K]`` if 8 bits, else uint8 ``[..., K/2]``, two codes in a byte, the first one low.
        bits: 8 or 4.

    Returns:
        int32 ``[..., words]``.
    """
    stored = codes.view(torch.uint8) ^ _FLIP[bits]
    return _ordered(pad(stored, (0, -stored.shape[-1] % _BYTES)).contiguous()).view(torch.int32)


def unpack_words(words: Tensor, bits: int, K: int) -> Tensor:
    """The inverse of ``pack_words``: the first K codes of each row; one code more if K is odd and bits 4."""
    stored = _ordered(words.contiguous().view(torch.uint8))[..., : -(-K * bits // 8)]
    codes = stored.contiguous() ^ _FLIP[bits]
    return codes.view(torch.int8) if bits == 8 else codes


def _ordered(stored: Tensor) -> Tensor:
    if sys.byteorder == "little":
        return stored
    return stored.reshape(*stored.shape[:-1], -1, _BYTES).flip(-1).reshape(stored.shape)
