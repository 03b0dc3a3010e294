from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from fewbits.measure.pieces import next_text, token_texts


class Words:
    """A tokenizer that drops the space before the first word of what it decodes, as sentencepiece does."""

    words = ("_the", "_cat", "s", "_sat")

    def decode(self, ids: list[int], **_: Any) -> str:
        return "".join(self.words[each] for each in ids).replace("_", " ").removeprefix(" ")


class Bytes:
    """A tokenizer of single bytes."""

    def decode(self, ids: list[int], **_: Any) -> str:
        return bytes(ids).decode(errors="replace")


def test_a_space_before_a_word_stays_with_it() -> None:
    assert token_texts(Words(), [0, 1, 2, 3]) == ("the", " cat", "s", " sat")
    assert next_text(Words(), [0, 1], 3) == " sat"


def test_a_character_belongs_to_the_token_that_completes_it() -> None:
    assert token_texts(Bytes(), list("aé€".encode())) == ("a", "", "é", "", "", "€")
    said = "é".encode()
    assert next_text(Bytes(), [said[0]], said[1]) == "é"


def test_bytes_that_are_no_text_do_not_hold_back_the_rest() -> None:
    texts = token_texts(Bytes(), [*b"\xff\xfe\xff\xfe", *b"ok"])
    assert "".join(texts) == "\ufffd" * 4 + "ok"
    assert token_texts(Bytes(), [0xE2, 0x82]) == ("", "\ufffd")


@given(st.text(min_size=1))
def test_joined_they_are_the_text(text: str) -> None:
    assert "".join(token_texts(Bytes(), list(text.encode()))) == text


def test_a_real_tokenizer_decodes_so(byte_tokenizer: Any) -> None:
    ids = byte_tokenizer("naïve 漢字 🙂 text, and more.", add_special_tokens=False)["input_ids"]
    texts = token_texts(byte_tokenizer, ids)
    assert len(texts) == len(ids)
    assert "".join(texts) == "naïve 漢字 🙂 text, and more."
