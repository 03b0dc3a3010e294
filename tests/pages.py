"""The pages that people read, and what is in them: code blocks, commands, links, headings."""

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
DOCS = [path.relative_to(ROOT).as_posix() for path in sorted((ROOT / "docs").rglob("*.md"))]
FRONT = ["README.md", *(["README.zh-CN.md"] if (ROOT / "README.zh-CN.md").exists() else [])]
PAGES = [*FRONT, "CONTRIBUTING.md", "BENCHMARKS.md", "CHANGELOG.md", "benchmarks/README.md", *DOCS]

_BLOCK = re.compile(
    r"(?:^<!-- not run: (?P<why>.+?) -->\n+)?^(?P<indent> *)```(?P<language>\w*)[^\n]*\n(?P<code>.*?)^ *```$",
    re.DOTALL | re.MULTILINE,
)


@dataclass(frozen=True)
class Block:
    """A fenced code block: its language, its lines, where it begins, and why it is not run, if it is not."""

    language: str
    code: str
    line: int
    why_not: str | None


def read(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def blocks(text: str) -> list[Block]:
    """Every code block, from the top of the page to its end."""
    return [
        Block(
            match["language"],
            re.sub(rf"^{match['indent']}", "", match["code"], flags=re.MULTILINE),
            text.count("\n", 0, match.start("code")) + 1,
            match["why"],
        )
        for match in _BLOCK.finditer(text)
    ]


def prose(text: str) -> str:
    """The page without its code blocks."""
    return re.sub(r"^( *)```.*?^\1```$", "", text, flags=re.DOTALL | re.MULTILINE)


def commands(code: str) -> list[list[str]]:
    """The `fewbits ...` command lines of a block, with `\\` continuations joined and remarks and pipes left out."""
    lines = code.replace("\\\n", " ").splitlines()
    found = filter(None, (re.match(r"\s*(?:\$ )?(?:\S*/)?fewbits ([a-z-].*)", line) for line in lines))
    return [shlex.split(re.split(r"\s(?:\||>|&&)\s", match[1])[0], comments=True) for match in found]
