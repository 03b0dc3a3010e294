"""Windows of a text in an order that the seed gives; a position, one number, says how far a run has read.

    text -> tokens -> | window 0 | window 1 | … | window W-1 | rest: left out
    epoch 0: a permutation of the W windows; epoch 1: another; …    position p is the window p mod W of epoch p div W

Shapes: W windows, T tokens in a window, B windows in a batch.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fewbits.errors import FewbitsError
from fewbits.models.text import read_text


class Windows:
    """The windows of a text.

    Args:
        tokens: int64 ``[W, T]``.
        seed: Of their order.
    """

    def __init__(self, tokens: Tensor, seed: int) -> None:
        self.tokens, self._seed = tokens, seed
        self._epoch, self._order = -1, torch.empty(0, dtype=torch.int64)

    @classmethod
    def of(cls, tokenizer: Callable[..., Mapping[str, Any]], text: Path, length: int, seed: int) -> Windows:
        """Cut a UTF-8 file into windows of ``length`` tokens that follow each other, without special tokens.

        Raises:
            FewbitsError: The file is missing, empty, not UTF-8, or fills no window.
        """
        # verbose=False: the text is longer than the model's context by design, and is cut here
        ids = tokenizer(read_text(text), add_special_tokens=False, verbose=False)["input_ids"]
        count = len(ids) // length
        if count < 1:
            raise FewbitsError(
                f"text file {text} has {len(ids)} tokens, and a window has {length}: give a longer text, or --length "
                f"{max(2, len(ids))} at most"
            )
        return cls(torch.tensor(ids[: count * length], dtype=torch.int64).view(count, length), seed)

    def take(self, position: int, count: int) -> Tensor:
        """The windows from a position on, ``[count, T]``; where an epoch ends the next begins."""
        return torch.stack([self.tokens[self._index(position + i)] for i in range(count)])

    def _index(self, position: int) -> Tensor:
        epoch, place = divmod(position, len(self.tokens))
        if epoch != self._epoch:
            generator = torch.Generator().manual_seed((self._seed << 32) + epoch)
            self._epoch, self._order = epoch, torch.randperm(len(self.tokens), generator=generator)
        return self._order[place]

    def fingerprint(self) -> str:
        """Of the tokens: a resumed run must read the same."""
        return hashlib.sha256(self.tokens.numpy().tobytes()).hexdigest()
