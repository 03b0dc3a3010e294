"""The text of single tokens, so that what was measured at a token can be shown at its word."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

_REPLACEMENT = "\ufffd"  # what a decoder gives for bytes that are no whole character
_LONGEST_CHARACTER = 4  # bytes in UTF-8, and so tokens of a byte-level tokenizer
_CONTEXT = 8  # tokens before one that its text is decoded with


def token_texts(tokenizer: Any, ids: Sequence[int]) -> tuple[str, ...]:
    """The text of each token; joined, they are the decoded text.

    A token is decoded together with the piece before it, since some tokenizers drop a space at the start of what they
    decode. One that ends inside a character has no text: the token that completes it has the whole.

    Args:
        tokenizer: with `decode`, as transformers' have it.
        ids: the tokens of one window.
    """
    texts: list[str] = []
    before = shown = 0  # ids[before:shown] have been given already
    for end in range(1, len(ids) + 1):
        old, new = _decode(tokenizer, ids[before:shown]), _decode(tokenizer, ids[before:end])
        if new.endswith(_REPLACEMENT) and end - shown < _LONGEST_CHARACTER and end < len(ids):
            texts.append("")
            continue
        texts.append(new[len(old) :])
        before, shown = shown, end
    return tuple(texts)


def next_text(tokenizer: Any, ids: Sequence[int], token: int) -> str:
    """The text that a token adds after others."""
    context = list(ids[-_CONTEXT:])
    old, new = _decode(tokenizer, context), _decode(tokenizer, [*context, token])
    return new[len(old.rstrip(_REPLACEMENT)) :]


def _decode(tokenizer: Any, ids: Sequence[int]) -> str:
    text: str = tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)
    return text
