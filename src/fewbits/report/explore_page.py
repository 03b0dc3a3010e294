"""The explore page: where its parts are, and how it is written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fewbits.report.one_file import one_file, refuse_unwritable, write_whole


def page_html(data: dict[str, Any]) -> str:
    """The page with its data, self-contained: HTML of well under 1 MB that makes no request."""
    return one_file("page", data)


def write_page(path: Path, html: str) -> None:
    """Write the page, whole or not at all.

    Raises:
        FewbitsError: the path is a folder, or its folder does not exist.
        OSError: it cannot be written.
    """
    refuse_unwritable(path, "--out", "explore.html")
    write_whole(path, html)
