"""Texts: the built-in one that every machine has, and what a user gives as a file."""

from __future__ import annotations

from pathlib import Path

from fewbits.errors import FewbitsError


def read_text(path: Path) -> str:
    """The whole text of a file.

    Raises:
        FewbitsError: The file is missing, a folder, empty, or not UTF-8.
    """
    if not path.is_file():
        what = "is a folder" if path.is_dir() else "does not exist"
        raise FewbitsError(f"text file {path} {what}: give the path of a UTF-8 text file")
    data = path.read_bytes()
    try:
        content = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise FewbitsError(
            f"text file {path} is not UTF-8: byte 0x{data[error.start]:02x} at offset {error.start}; save it as UTF-8"
        ) from None
    if not content.strip():
        raise FewbitsError(
            f"text file {path} is empty ({len(data)} bytes): give a text of at least one window of tokens"
        )
    return content


def built_in_text() -> str:
    """The topics of Python's own help, sorted by key and joined by single spaces: English prose and code.

    It needs no download and no licence beyond Python's. It differs slightly between Python versions, so figures
    are comparable under one Python version only (`text_name` says which).
    """
    from pydoc_data.topics import topics

    return " ".join(topics[key] for key in sorted(topics))
