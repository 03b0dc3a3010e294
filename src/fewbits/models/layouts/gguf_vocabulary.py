"""The vocabulary that a GGUF file carries: a tokenizer of transformers as metadata keys.

Two kinds are written. A byte-level vocabulary (`gpt2`) holds tokens in an alphabet of 256 letters that stand for bytes,
and merges; a sentencepiece one (`llama`) pieces, bytes such as `<0x0A>`, and scores instead of merges. Everything is
read from the tokenizer itself: what `tokenizer.json` says, and what it does to a text.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from gguf import TokenType
from transformers import PreTrainedTokenizerBase

from fewbits.errors import FewbitsError
from fewbits.models.gguf_pretokenizer import PRE_TOKENIZERS, find_pre_tokenizer
from fewbits.models.layouts.gguf_keys import Keys

_SPACE = "▁"  # what sentencepiece puts for a space
_NO_SCORE = -1e6  # of what no merge makes: below every merge's, and whole in float32
_SPECIAL = {"bos": "bos", "eos": "eos", "unknown": "unk", "padding": "pad"}


def vocabulary_keys(tokenizer: PreTrainedTokenizerBase, size: int, path: Path, *, ends: Sequence[int] = ()) -> Keys:
    """The keys under `tokenizer`.

    Args:
        tokenizer: One that the tokenizers package runs.
        size: Rows of the embedding; tokens that the tokenizer lacks are filled up as unused.
        path: The model, for messages.
        ends: Tokens that end an answer; the first that does not end a text is written as the end of a turn.

    Raises:
        FewbitsError: The tokenizer is of neither kind, or does what GGUF cannot say.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        _refuse(path, f"a tokenizer of class {type(tokenizer).__name__} is not run by the tokenizers package")
    described: dict[str, Any] = json.loads(backend.to_str())
    if described["model"]["type"] != "BPE":
        _refuse(path, f"a tokenizer of model {described['model']['type']!r} is not written as GGUF (BPE is)")
    merges = [tuple(merge.split(" ") if isinstance(merge, str) else merge) for merge in described["model"]["merges"]]
    tokens, types = _tokens(tokenizer, size, path)
    if described["model"].get("byte_fallback"):
        keys = _sentencepiece_keys(described, merges, tokens, types, tokenizer.unk_token_id, path)
    else:
        keys = _byte_level_keys(described, merges, path)
    keys |= {"tokens": tokens, "token_type": [int(kind) for kind in types]}
    keys |= _special_keys(tokenizer, ends)
    return {f"tokenizer.ggml.{key}": value for key, value in keys.items()} | _template_keys(tokenizer)


def _tokens(tokenizer: PreTrainedTokenizerBase, size: int, path: Path) -> tuple[list[str], list[TokenType]]:
    vocabulary = tokenizer.get_vocab()
    if vocabulary and (last := max(vocabulary.values())) >= size:
        _refuse(path, f"the tokenizer has a token {last}, but the model {size} rows for tokens")
    tokens, types = [f"[PAD{index}]" for index in range(size)], [TokenType.UNUSED] * size
    for token, index in vocabulary.items():
        tokens[index], types[index] = token, TokenType.NORMAL
    for index, added in tokenizer.added_tokens_decoder.items():
        types[index] = TokenType.CONTROL if added.special else TokenType.USER_DEFINED
        if not added.special:  # readers match these in the text itself, where a space is a space
            tokens[index] = added.content.replace(_SPACE, " ")
    for index in (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id):
        if index is not None:
            types[index] = TokenType.CONTROL
    return tokens, types


def _byte_level_keys(described: dict[str, Any], merges: list[tuple[str, ...]], path: Path) -> Keys:
    known = find_pre_tokenizer(described)
    if known is None:
        _refuse(
            path,
            f"the tokenizer cuts text in a way that has no name in GGUF ({', '.join(PRE_TOKENIZERS)} have)",
        )
    if described["normalizer"] not in (None, {"type": "NFC"}):
        _refuse(path, f"the tokenizer's normalizer {described['normalizer'].get('type')!r} cannot be written as GGUF")
    return {"model": "gpt2", "pre": known.name, "merges": [" ".join(merge) for merge in merges]}


def _sentencepiece_keys(
    described: dict[str, Any],
    merges: list[tuple[str, ...]],
    tokens: list[str],
    types: list[TokenType],
    unknown: int | None,
    path: Path,
) -> Keys:
    """The keys of a sentencepiece vocabulary: a piece's score is higher the sooner it is merged."""
    rank = {"".join(merge): -index for index, merge in reversed(list(enumerate(merges)))}
    for index, token in enumerate(tokens):
        if types[index] is TokenType.NORMAL and len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
            types[index] = TokenType.BYTE
    if unknown is not None:
        types[unknown] = TokenType.UNKNOWN
    _check_merges(merges, [token for token, kind in zip(tokens, types, strict=True) if kind is TokenType.NORMAL], path)
    scores = [float(rank.get(token, _NO_SCORE)) for token in tokens]
    return {"model": "llama", "pre": "default", "scores": scores, "add_space_prefix": _adds_space(described)}


def _check_merges(merges: list[tuple[str, ...]], pieces: list[str], path: Path) -> None:
    """Check that any two pieces which together are a piece may be merged: scores can say nothing else."""
    known, wanted = set(merges), set(pieces)
    for piece in pieces:
        for cut in range(1, len(piece)):
            pair = piece[:cut], piece[cut:]
            if pair[0] in wanted and pair[1] in wanted and pair not in known:
                _refuse(path, f"the tokenizer does not merge {pair[0]!r} and {pair[1]!r} to {piece!r}, as GGUF implies")


def _adds_space(described: dict[str, Any]) -> bool:
    """Whether a space is put before a text."""
    before, normalizer = described["pre_tokenizer"] or {}, described["normalizer"] or {}
    steps = normalizer.get("normalizers", [normalizer])
    return before.get("prepend_scheme", "never") != "never" or any(step.get("type") == "Prepend" for step in steps)


def _special_keys(tokenizer: PreTrainedTokenizerBase, ends: Sequence[int]) -> Keys:
    keys: Keys = {}
    for name, its in _SPECIAL.items():
        if (index := getattr(tokenizer, f"{its}_token_id")) is not None:
            keys[f"{name}_token_id"] = index
    turn = [index for index in ends if index != tokenizer.eos_token_id]
    if turn and tokenizer.eos_token_id is not None:
        keys["eot_token_id"] = turn[0]
    ids = tokenizer("a").input_ids  # what it does, whichever of its settings makes it do so
    keys["add_bos_token"] = bool(ids) and ids[0] == tokenizer.bos_token_id
    keys["add_eos_token"] = bool(ids) and ids[-1] == tokenizer.eos_token_id
    return keys


def _template_keys(tokenizer: PreTrainedTokenizerBase) -> Keys:
    match tokenizer.chat_template:
        case str(template):
            return {"tokenizer.chat_template": template}
        case dict(templates) if templates:
            named = {f"tokenizer.chat_template.{name}": text for name, text in templates.items() if name != "default"}
            default = templates.get("default")
            return named | ({"tokenizer.chat_template": default} if default else {})
    return {}


def _refuse(path: Path, why: str) -> NoReturn:
    raise FewbitsError(f"{path}: {why}; use --layout compressed-tensors")
