"""How byte-level vocabularies cut text before merging, by the names that GGUF files give it, as data.

A GGUF file holds no regular expression, only a name (`tokenizer.ggml.pre`); its readers know the rest. A wrong name
means other tokens for the same text, digits above all, with no sign of why the answers are worse.
Source: https://github.com/ggml-org/llama.cpp, `src/llama-vocab.cpp`, `llm_tokenizer_bpe` and `llama_vocab::impl::load`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tokenizers import Regex, Tokenizer, normalizers, pre_tokenizers

_DIGITS = r"\p{N}"
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_REST = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_WORDS = rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|%s| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_REST}"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_BEFORE = r"[^\r\n\p{L}\p{N}]?"
_CASES = (
    rf"{_BEFORE}{_UPPER}*{_LOWER}+%s|{_BEFORE}{_UPPER}+{_LOWER}*%s"
    rf"|%s| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_REST}"
)


@dataclass(frozen=True)
class PreTokenizer:
    """One way to cut text.

    Attributes:
        name: As `tokenizer.ggml.pre` has it.
        steps: Regular expressions applied one after another; matches and what lies between them are pieces.
        ignore_merges: Whether a piece that is a token is taken whole, reached by merges or not.
        normal_form: Unicode normal form that the text gets first, or None.
    """

    name: str
    steps: tuple[str, ...]
    ignore_merges: bool = False
    normal_form: str | None = None


PRE_TOKENIZERS = {
    known.name: known
    for known in (
        PreTokenizer("gpt-2", (_GPT2,)),
        PreTokenizer("smollm", (_DIGITS, _GPT2)),
        PreTokenizer("llama-bpe", (_WORDS % r"\p{N}{1,3}",), ignore_merges=True),
        PreTokenizer("smaug-bpe", (_WORDS % r"\p{N}{1,3}",)),
        PreTokenizer("qwen2", (_WORDS % r"\p{N}",), normal_form="NFC"),
        PreTokenizer("tekken", (_CASES % ("", "", r"\p{N}"),), ignore_merges=True),
        PreTokenizer("gpt-4o", (_CASES % (f"{_CONTRACTIONS}?", f"{_CONTRACTIONS}?", r"\p{N}{1,3}"),)),
    )
}


def find_pre_tokenizer(tokenizer: dict[str, Any]) -> PreTokenizer | None:
    """The entry for a byte-level tokenizer, given as the contents of its `tokenizer.json`; None if there is none."""
    steps = _steps(tokenizer.get("pre_tokenizer"))
    ignore_merges = bool(tokenizer["model"].get("ignore_merges"))
    for known in PRE_TOKENIZERS.values():
        if known.steps == steps and known.ignore_merges == ignore_merges:
            return known
    return None


def set_pre_tokenizer(tokenizer: Tokenizer, known: PreTokenizer) -> None:
    """Make a byte-level tokenizer cut text that way."""
    splits = [pre_tokenizers.Split(Regex(step), behavior="isolated") for step in known.steps]
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*splits, byte_level])
    tokenizer.model.ignore_merges = known.ignore_merges
    if known.normal_form == "NFC":
        tokenizer.normalizer = normalizers.NFC()


def _steps(node: dict[str, Any] | None) -> tuple[str, ...]:
    """The regular expressions of a pre-tokenizer; what is not one of them becomes a step that no entry has."""
    match node:
        case {"type": "Sequence", "pretokenizers": nodes}:
            return sum((_steps(inner) for inner in nodes), ())
        case {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False}:
            return (str(regex),)
        case {"type": "Digits", "individual_digits": True}:
            return (_DIGITS,)
        case {"type": "ByteLevel", "add_prefix_space": False, "use_regex": bool(regex)}:
            return (_GPT2,) if regex else ()
    return (f"<{node}>",)
