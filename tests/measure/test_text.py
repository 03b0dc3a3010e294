import re
from pathlib import Path

import pytest
import torch

from fewbits.errors import FewbitsError
from fewbits.measure.text import built_in_text, text_name, token_windows


def letters(text: str, add_special_tokens: bool, verbose: bool) -> dict[str, list[int]]:
    """A tokenizer: one token per character."""
    assert not add_special_tokens
    return {"input_ids": [ord(letter) for letter in text]}


def test_built_in_text_begins_at_token_20000_and_goes_on_from_window_to_window() -> None:
    ids = token_windows(letters)
    assert ids.shape == (8, 512)
    assert ids.dtype == torch.int64
    assert "".join(map(chr, ids.flatten().tolist())) == built_in_text()[20_000:24_096]


def test_built_in_text_is_sorted_by_topic() -> None:
    from pydoc_data.topics import topics

    first, second, *_ = sorted(topics)
    assert built_in_text().startswith(f"{topics[first]} {topics[second]} ")


def test_a_file_is_read_from_its_start_and_may_fill_fewer_windows(tmp_path: Path) -> None:
    file = tmp_path / "mine.txt"
    file.write_text("abcdefghij" * 3)
    ids = token_windows(letters, file, windows=8, window_tokens=8)
    assert ids.shape == (3, 8)
    assert "".join(map(chr, ids[1].tolist())) == "ijabcdef"
    assert text_name(file) == "mine.txt"


def test_a_real_tokenizer_does_not_warn_about_the_length(byte_tokenizer, caplog) -> None:  # type: ignore[no-untyped-def]
    assert token_windows(byte_tokenizer, windows=2).shape == (2, 512)
    assert not caplog.records


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, r"text file .*mine.txt does not exist: give the path of a UTF-8 text file"),
        (b"", r"text file .*mine.txt is empty \(0 bytes\): give a text"),
        (b" \n", r"text file .*mine.txt is empty \(2 bytes\): give a text"),
        (b"gr\xfc\xdfe", r"text file .*mine.txt is not UTF-8: byte 0xfc at offset 2; save it as UTF-8"),
        (b"abc", r"mine.txt is too short: 3 tokens, and one window ends at token 8; give a longer text"),
    ],
)
def test_unusable_files(tmp_path: Path, content: bytes | None, message: str) -> None:
    file = tmp_path / "mine.txt"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(FewbitsError, match=message) as caught:
        token_windows(letters, file, window_tokens=8)
    assert "\n" not in str(caught.value)


def test_a_folder_is_no_text(tmp_path: Path) -> None:
    with pytest.raises(FewbitsError, match=re.escape(f"text file {tmp_path} is a folder")):
        token_windows(letters, tmp_path)


@pytest.mark.parametrize(
    ("windows", "window_tokens", "message"),
    [(0, 8, "windows is 0: at least 1"), (1, 1, "window_tokens is 1: a window needs at least 2")],
)
def test_impossible_windows(windows: int, window_tokens: int, message: str) -> None:
    with pytest.raises(FewbitsError, match=message):
        token_windows(letters, windows=windows, window_tokens=window_tokens)
