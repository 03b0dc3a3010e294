"""Vocabularies in GGUF: the same text gives the same tokens, or the tokenizer is refused before any work."""

import json
from pathlib import Path
from typing import Any

import gguf
import pytest
from gguf_roundtrip import convert, metadata
from tiny_folder import SIZES, TEMPLATE, TEXTS, byte_level_tokenizer, sentencepiece_tokenizer, write_folder
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import TokenizersBackend

from fewbits.errors import FewbitsError
from fewbits.models.layouts.gguf import plan, write
from fewbits.models.source import open_source


@pytest.mark.parametrize("pre", ["gpt-2", "smollm", "llama-bpe", "smaug-bpe", "qwen2", "gpt-4o"])
def test_a_byte_level_tokenizer_cuts_text_as_before(tmp_path: Path, pre: str) -> None:
    tokenizer = byte_level_tokenizer(pre)
    if pre == "smaug-bpe":  # as llama-bpe, but a piece that is a token must be reached by merges
        tokenizer = byte_level_tokenizer("llama-bpe")
        tokenizer.backend_tokenizer.model.ignore_merges = False
    write_folder(tmp_path / "tiny", tokenizer=tokenizer)
    _, file, _ = convert(tmp_path / "tiny")
    assert metadata(tmp_path / "tiny.gguf", "tokenizer.ggml.pre") == pre
    for text in [*TEXTS, "e\u0301 12 123 1234 12345", "heHE (he) \r\n\n  HEhe/\n"]:
        assert file.tokenizer()(text).input_ids == tokenizer(text).input_ids, text


@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize("eos", [False, True])
@pytest.mark.parametrize("kind", [byte_level_tokenizer, sentencepiece_tokenizer])
def test_what_a_tokenizer_puts_around_a_text_reads_back(tmp_path: Path, kind: Any, bos: bool, eos: bool) -> None:
    tokenizer = kind(add_bos_token=bos, add_eos_token=eos)
    write_folder(tmp_path / "tiny", tokenizer=tokenizer)
    _, file, _ = convert(tmp_path / "tiny")
    ids = file.tokenizer()("hello").input_ids
    assert (ids[0] == 1, ids[-1] == 2) == (bos, eos)
    assert ids == open_source(tmp_path / "tiny").tokenizer()("hello").input_ids


def test_token_types_and_scores_are_those_of_the_pieces(tmp_path: Path) -> None:
    write_folder(tmp_path / "tiny", "mistral")
    convert(tmp_path / "tiny")
    path = tmp_path / "tiny.gguf"
    tokens = metadata(path, "tokenizer.ggml.tokens")
    types = dict(zip(tokens, metadata(path, "tokenizer.ggml.token_type"), strict=True))
    scores = dict(zip(tokens, metadata(path, "tokenizer.ggml.scores"), strict=True))
    assert len(tokens) == SIZES["vocab_size"]
    assert {token: types[token] for token in ("▁he", "<unk>", "</s>", "<|user|>", "<0x0A>", "[PAD319]")} == {
        "▁he": gguf.TokenType.NORMAL,
        "<unk>": gguf.TokenType.UNKNOWN,
        "</s>": gguf.TokenType.CONTROL,
        "<|user|>": gguf.TokenType.CONTROL,
        "<0x0A>": gguf.TokenType.BYTE,
        "[PAD319]": gguf.TokenType.UNUSED,
    }
    assert scores["▁h"] > scores["he"] > scores["▁he"] > scores["hell"] > scores["h"]
    assert metadata(path, "tokenizer.ggml.add_space_prefix") is True


def test_no_space_before_a_text_reads_back(tmp_path: Path) -> None:
    tokenizer = sentencepiece_tokenizer(add_prefix_space=False)
    write_folder(tmp_path / "tiny", tokenizer=tokenizer)
    source, file, _ = convert(tmp_path / "tiny")
    for text in TEXTS:
        ids = source.tokenizer()(text).input_ids
        assert file.tokenizer()(text).input_ids == ids
        assert file.tokenizer().decode(ids) == source.tokenizer().decode(ids)
    assert file.tokenizer().tokenize("hello") == ["hello"]


def test_several_chat_templates_are_written_by_name(tmp_path: Path) -> None:
    tokenizer = byte_level_tokenizer()
    tokenizer.chat_template = {"default": TEMPLATE, "tool_use": "tools"}
    write_folder(tmp_path / "tiny", tokenizer=tokenizer)
    _, file, _ = convert(tmp_path / "tiny")
    assert file.tokenizer().chat_template == TEMPLATE
    assert metadata(tmp_path / "tiny.gguf", "tokenizer.chat_template.tool_use") == "tools"


def unigram() -> TokenizersBackend:
    backend = Tokenizer(models.Unigram([("<unk>", 0.0), ("a", -1.0)], unk_id=0))
    return TokenizersBackend(tokenizer_object=backend, unk_token="<unk>")


def odd_sentencepiece() -> Any:
    tokenizer = sentencepiece_tokenizer()
    described = json.loads(tokenizer.backend_tokenizer.to_str())
    described["model"]["merges"].remove(["▁", "he"])
    return TokenizersBackend(tokenizer_object=Tokenizer.from_str(json.dumps(described)), unk_token="<unk>")


def lowercase() -> Any:
    from tokenizers import normalizers

    tokenizer = byte_level_tokenizer()
    tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()
    return tokenizer


def whitespace() -> Any:
    tokenizer = byte_level_tokenizer()
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return tokenizer


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (unigram, r"a tokenizer of model 'Unigram' is not written as GGUF \(BPE is\)"),
        (
            lambda: byte_level_tokenizer(r"\p{L}"),
            r"the tokenizer cuts text in a way that has no name in GGUF \(gpt-2, ",
        ),
        (whitespace, "the tokenizer cuts text in a way that has no name in GGUF"),
        (lowercase, "the tokenizer's normalizer 'Lowercase' cannot be written as GGUF"),
        (odd_sentencepiece, "the tokenizer does not merge '▁' and 'he' to '▁he', as GGUF implies"),
    ],
)
def test_a_tokenizer_that_gguf_cannot_say_is_refused(tmp_path: Path, make: Any, message: str) -> None:
    write_folder(tmp_path / "tiny", tokenizer=make())
    source = open_source(tmp_path / "tiny")
    with pytest.raises(FewbitsError, match=message):
        write(tmp_path / "tiny.gguf", source, plan(source, "q8_0"))
    assert not [*tmp_path.glob("*gguf*")]


def test_more_tokens_than_the_model_has_rows_are_refused(tmp_path: Path) -> None:
    write_folder(tmp_path / "tiny", vocab_size=200)
    source = open_source(tmp_path / "tiny")
    with pytest.raises(FewbitsError, match="the tokenizer has a token 270, but the model 200 rows for tokens"):
        write(tmp_path / "tiny.gguf", source, plan(source, "q8_0"))


def test_a_tokenizer_that_is_not_run_by_the_tokenizers_package_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_folder(tmp_path / "tiny")
    source = open_source(tmp_path / "tiny")
    monkeypatch.setattr(source, "tokenizer", lambda: object())
    with pytest.raises(FewbitsError, match="a tokenizer of class object is not run by the tokenizers package"):
        write(tmp_path / "tiny.gguf", source, plan(source, "q8_0"))
