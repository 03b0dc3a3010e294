"""The tokenizer that a GGUF file carries in its metadata, built by transformers' own converter.

What the converter leaves out is set here: how a byte-level vocabulary cuts text before merging, where the converter
knows no expression for the name, and that a sentencepiece vocabulary puts no space before a text. What it adds, tokens
that the file does not have, is taken away.
"""

from typing import Any

import numpy as np
from tokenizers import Tokenizer, decoders, pre_tokenizers
from transformers import PreTrainedTokenizerBase, TokenizersBackend

from fewbits.errors import FewbitsError
from fewbits.models.gguf_header import GgufHeader, StringArray
from fewbits.models.gguf_pretokenizer import PRE_TOKENIZERS, set_pre_tokenizer

try:
    from transformers.integrations.gguf import GGUF_TOKENIZER_MAPPING, convert_gguf_tokenizer
except ImportError:  # where it lived before transformers 5.2x
    from transformers.integrations.ggml import GGUF_TOKENIZER_MAPPING, convert_gguf_tokenizer

_SPECIAL_TOKENS = {
    "bos_token": "tokenizer.ggml.bos_token_id",
    "eos_token": "tokenizer.ggml.eos_token_id",
    "unk_token": "tokenizer.ggml.unknown_token_id",
    "pad_token": "tokenizer.ggml.padding_token_id",
}


def gguf_tokenizer(header: GgufHeader) -> PreTrainedTokenizerBase:
    """The tokenizer of a GGUF file: the one that `AutoTokenizer.from_pretrained(folder, gguf_file=…)` gives.

    Raises:
        FewbitsError: The file has no vocabulary, or one that transformers cannot rebuild.
    """
    if not isinstance(header.metadata.get("tokenizer.ggml.tokens"), StringArray):
        raise FewbitsError(f"{header.path}: has no vocabulary (metadata key tokenizer.ggml.tokens)")
    vocabulary = _section(header, "tokenizer")
    settings = _section(header, "tokenizer_config")
    if vocabulary.get("tokenizer_type") == "llama":
        settings.setdefault("add_bos_token", True)  # llama.cpp's default where a sentencepiece vocabulary says nothing
    for name, key in _SPECIAL_TOKENS.items():
        settings[name] = _token(header, key, vocabulary["tokens"])
    try:
        backend, more = convert_gguf_tokenizer(header.metadata["general.architecture"], vocabulary)
        backend = _without_strangers(backend, len(vocabulary["tokens"]))
        _complete(backend, vocabulary)
        return TokenizersBackend(tokenizer_object=backend, name_or_path=str(header.path), **(settings | more))
    except Exception as error:  # the converter trusts the file: a broken vocabulary fails anywhere
        raise FewbitsError(
            f"{header.path}: transformers cannot build its tokenizer: {' '.join(str(error).split())}"
        ) from error


def _without_strangers(backend: Tokenizer, size: int) -> Tokenizer:
    """The tokenizer without tokens that the converter adds of its own: the model has no rows for them."""
    added = backend.get_added_tokens_decoder()
    if all(index < size for index in added):
        return backend
    result = Tokenizer(backend.model)  # which is shared; added tokens cannot be taken away
    for part in ("normalizer", "pre_tokenizer", "post_processor", "decoder"):
        setattr(result, part, getattr(backend, part))
    for index, token in sorted(added.items()):
        if index < size:
            (result.add_special_tokens if token.special else result.add_tokens)([token])
    return result


def _complete(backend: Tokenizer, vocabulary: dict[str, Any]) -> None:
    kind, known = vocabulary.get("tokenizer_type"), PRE_TOKENIZERS.get(vocabulary.get("pre_tokenizer_type", ""))
    if kind == "gpt2" and known is not None:
        set_pre_tokenizer(backend, known)
    before = backend.pre_tokenizer
    if kind == "llama" and vocabulary.get("add_prefix_space") is False and isinstance(before, pre_tokenizers.Metaspace):
        before.prepend_scheme = "never"
        backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])


def _section(header: GgufHeader, section: str) -> dict[str, Any]:
    """The tokenizer's metadata under the names that transformers gives them, as plain Python values."""
    values = {}
    for key, name in GGUF_TOKENIZER_MAPPING[section].items():
        value = header.metadata.get(f"tokenizer.{key}")
        if isinstance(value, StringArray):
            value = value.decode()
        elif isinstance(value, np.ndarray):
            value = value.tolist()
        if value is not None:
            values[name] = value
    return values


def _token(header: GgufHeader, key: str, tokens: list[str]) -> str | None:
    index = header.index(key)
    if index is None:
        return None
    if index >= len(tokens):
        raise FewbitsError(f"{header.path}: {key} is {index!r}, but the vocabulary has {len(tokens)} tokens")
    return tokens[index]
