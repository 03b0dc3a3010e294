"""For MkDocs: a page may link to files of the repository that lie outside docs/, as it does where it is read there.

Markdown files among them become pages of the site, others are copied into it; links are written anew to where they are.
"""

from __future__ import annotations

import os
import re
from pathlib import Path, PurePosixPath

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files, InclusionLevel
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
HOME = "repository"
"""The folder of the site that such files are in."""

_BESIDE = InclusionLevel.NOT_IN_NAV
_LINK = re.compile(r"(\]\()([^)\s#]+)((?:#[^)\s]*)?\))")
_HTML = re.compile(r'(\b(?:href|src)=")([^"#]+)((?:#[^"]*)?")')
_CODE = re.compile(r"^(```|~~~).*?^\1|`[^`\n]+`", re.DOTALL | re.MULTILINE)


def on_files(files: Files, *, config: MkDocsConfig) -> Files:
    """Take in every file that a page links to, or a page so taken in."""
    pending = [(ROOT / "docs" / file.src_uri) for file in files.documentation_pages()]
    known = set(pending)
    while pending:
        page = pending.pop()
        for match in _LINK.finditer(_CODE.sub("", page.read_text(encoding="utf-8"))):
            target = _outside(page, match[2])
            if target is None or target in known:
                continue
            known.add(target)
            files.append(File.generated(config, _uri(target), abs_src_path=str(target), inclusion=_BESIDE))
            if target.suffix == ".md":
                pending.append(target)
    return files


def on_page_markdown(markdown: str, *, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Write links to such files as links within the site."""
    here = page.file.src_uri
    origin = ROOT / here.removeprefix(f"{HOME}/") if here.startswith(f"{HOME}/") else ROOT / "docs" / here

    def rewritten(match: re.Match[str]) -> str:
        if "://" in match[2] or match[2].startswith("mailto:"):
            return match[0]
        target = Path(os.path.normpath(origin.parent / match[2]))
        uri = _uri(target) if _outside(origin, match[2]) else _within_docs(target)
        return match[0] if uri is None else match[1] + os.path.relpath(uri, PurePosixPath(here).parent) + match[3]

    def rewritten_html(match: re.Match[str]) -> str:
        """The same for HTML, which MkDocs leaves alone: the address of the page itself."""
        target = Path(os.path.normpath(origin.parent / match[2]))
        file = files.get_file_from_path(_within_docs(target) or (_uri(target) if target.is_relative_to(ROOT) else ""))
        if "://" in match[2] or file is None:
            return match[0]
        return match[1] + os.path.relpath(file.dest_uri, PurePosixPath(page.file.dest_uri).parent) + match[3]

    return _HTML.sub(rewritten_html, _LINK.sub(rewritten, markdown))


def _outside(page: Path, link: str) -> Path | None:
    """The file of the repository, outside docs/, that a link leads to; None if it leads elsewhere."""
    target = Path(os.path.normpath(page.parent / link))
    if "://" in link or target.is_relative_to(ROOT / "docs") or not target.is_relative_to(ROOT):
        return None
    return target if target.is_file() else None


def _within_docs(target: Path) -> str | None:
    return target.relative_to(ROOT / "docs").as_posix() if target.is_relative_to(ROOT / "docs") else None


def _uri(target: Path) -> str:
    return f"{HOME}/{target.relative_to(ROOT).as_posix()}"
