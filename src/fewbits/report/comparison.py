"""The report of a comparison: one HTML file that needs no server, no network and nothing beside it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fewbits.errors import FewbitsError
from fewbits.report.comparison_data import page_data
from fewbits.report.one_file import one_file, refuse_unwritable, write_whole

_SUFFIXES = (".html", ".htm")


def report_html(data: dict[str, Any]) -> str:
    """The page of a comparison's JSON, with all that it shows in it.

    Args:
        data: what `Comparison.to_json()` gives. Any part may be None or missing; the page leaves it out.
    """
    return one_file("comparison_page", page_data(data))


def refuse_report(path: Path | None) -> None:
    """Find a wrong `--report` before minutes of work, not after.

    Raises:
        FewbitsError: the name does not end in .html or .htm, is a folder, or is in one that cannot be written to.
    """
    if path is None:
        return
    if path.suffix.lower() not in _SUFFIXES:
        raise FewbitsError(f"--report: {path} would be an HTML page; give it a name that ends in .html")
    refuse_unwritable(path, "--report", "report.html")


def write_report(data: dict[str, Any], path: Path) -> None:
    """Write the page, whole or not at all.

    Raises:
        FewbitsError: as `refuse_report`.
        OSError: it cannot be written.
    """
    refuse_report(path)
    write_whole(path, report_html(data))
