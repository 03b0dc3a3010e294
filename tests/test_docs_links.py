"""Every link of the pages leads somewhere: files and headings exist, addresses are well formed. Nothing is fetched."""

import os
import re
from pathlib import Path
from urllib.parse import urlsplit

import pytest

import fewbits
from pages import PAGES, ROOT, prose, read

_LINK = re.compile(
    r"!?\[(?:[^\]\[]|\[[^\]]*\])*\]\(([^)\s]+)\)"  # [text](target), ![picture](target), [![picture](…)](target)
    r"|<(?:img|a)\b[^>]*?\b(?:src|href)=\"([^\"]+)\""
    r"|<(https?:[^>]+)>"
)


def links(text: str) -> list[str]:
    """Targets of links and pictures, in Markdown and HTML; code is left out."""
    plain = re.sub(r"`[^`\n]*`", "code", prose(text))
    return [next(filter(None, match.groups())) for match in _LINK.finditer(plain)]


def anchors(text: str) -> set[str]:
    """The fragments that headings give, as code hosts and the site make them, and the `id`s of HTML."""
    found: set[str] = set(re.findall(r"\bid=\"([^\"]+)\"", text))
    for heading in re.findall(r"^#{1,6} +(.+?) *#*$", prose(text), flags=re.MULTILINE):
        words = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).replace("`", "").lower()
        slug = re.sub(r"[^\w\- ]", "", words).replace(" ", "-")
        found.add(f"{slug}-{sum(known.startswith(slug) for known in found)}" if slug in found else slug)
    return found


def broken(page: Path, target: str) -> str | None:
    """Why a link of a page leads nowhere, or None."""
    if re.match(r"[a-z]+:", target):
        address = urlsplit(target)
        fine = (address.scheme == "https" and "." in address.netloc and " " not in target) or address.scheme == "mailto"
        return None if fine else f"{target}: not https://host…"
    name, _, fragment = target.partition("#")
    path = Path(os.path.normpath(page.parent / name)) if name else page
    if not path.is_relative_to(ROOT) or not path.exists():
        return f"{target}: no such file"
    if fragment and (path.suffix != ".md" or fragment not in anchors(path.read_text(encoding="utf-8"))):
        return f"{target}: no such heading"
    return None


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str) -> None:
    assert [why for target in links(read(page)) if (why := broken(ROOT / page, target))] == []


def test_every_page_is_reached() -> None:
    """From the README, following links, one comes to every page."""
    seen, pending = set(), ["README.md"]
    while pending:
        page = pending.pop()
        seen.add(page)
        for target in links(read(page)):
            path = os.path.normpath(Path(page).parent / target.partition("#")[0])
            if path in PAGES and path not in seen:
                pending.append(path)
    assert set(PAGES) - seen == set()


def test_the_reference_has_every_public_name() -> None:
    shown = set(re.findall(r"^::: fewbits\.(\w+)", read("docs/reference.md"), flags=re.MULTILINE))
    assert shown == set(fewbits.__all__)


def test_both_readmes_link_each_other() -> None:
    assert "README.zh-CN.md" in links(read("README.md"))
    assert "README.md" in links(read("README.zh-CN.md"))


@pytest.mark.parametrize(
    ("target", "why"),
    [
        ("BENCHMARKS.md", None),
        ("docs/formats.md#number-line", "no such heading"),
        ("docs/formats.md#the-number-line", None),
        ("#training", None),
        ("docs/gone.md", "no such file"),
        ("../../etc/passwd", "no such file"),
        ("https://semver.org", None),
        ("http://semver.org", "not https"),
        ("https://semver", "not https"),
    ],
)
def test_a_broken_link_is_seen(target: str, why: str | None) -> None:
    found = broken(ROOT / "BENCHMARKS.md", target)
    assert found is None if why is None else why in str(found)


def test_links_and_headings_are_found() -> None:
    text = '[a](x.md#y) ![b](z.png) `[c](no)`\n```\n[d](no)\n```\n<img src="p.svg"> <https://e.org/f>\n'
    assert links(text) == ["x.md#y", "z.png", "p.svg", "https://e.org/f"]
    headings = "# A title\n## `code` & more\n## What's *new*?\n## A title\n```\n# no\n```\n## 半精度\n"
    assert anchors(headings) == {"a-title", "code--more", "whats-new", "a-title-1", "半精度"}
