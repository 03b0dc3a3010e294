"""The text that quality is measured on: a built-in one that every machine has, or the user's own file.

Shapes: W windows, T tokens in a window.
"""

from __future__ import annotations

import platform
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from fewbits.errors import FewbitsError
from fewbits.models.text import built_in_text, read_text

WINDOWS = 8
WINDOW_TOKENS = 512
_BUILT_IN_START = 20_000  # past the first topics, which are mostly grammar tables

Tokenizer = Callable[..., Mapping[str, Any]]
"""A transformers tokenizer, or anything that is called like one and returns `input_ids`."""


def text_name(text: str | Path | None = None) -> str:
    """What `token_windows` reads for this argument, for captions."""
    if text is None:
        return f"Python {platform.python_version()} help topics"
    return Path(text).name


def token_windows(
    tokenizer: Tokenizer,
    text: str | Path | None = None,
    windows: int = WINDOWS,
    window_tokens: int = WINDOW_TOKENS,
) -> torch.Tensor:
    """Cut a text into windows of tokens that follow each other, without special tokens.

    Args:
        tokenizer: turns the text into token ids.
        text: a UTF-8 file, read from its start; None takes the built-in text from token 20,000.
        windows: how many windows at most (W). A shorter file gives as many as it fills.
        window_tokens: tokens in each window (T).

    Returns:
        Token ids, int64 [W, T].

    Raises:
        FewbitsError: the file is missing, empty, not UTF-8, or fills no window.
    """
    if windows < 1:
        raise FewbitsError(f"windows is {windows}: at least 1 window is needed")
    if window_tokens < 2:
        raise FewbitsError(
            f"window_tokens is {window_tokens}: a window needs at least 2 tokens, one to predict another"
        )
    start = _BUILT_IN_START if text is None else 0
    content = built_in_text() if text is None else read_text(Path(text))
    # verbose=False: the text is longer than the model's context by design, and is cut here
    ids: Sequence[int] = tokenizer(content, add_special_tokens=False, verbose=False)["input_ids"]
    count = min(windows, (len(ids) - start) // window_tokens)
    if count < 1:
        raise FewbitsError(
            f"{text_name(text)} is too short: {len(ids)} tokens, and one window ends at token {start + window_tokens}; "
            "give a longer text, or shorter windows"
        )
    end = start + count * window_tokens
    return torch.tensor(ids[start:end], dtype=torch.int64).view(count, window_tokens)
