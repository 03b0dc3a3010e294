"""Every message that the troubleshooting page quotes is one that the sources can print."""

import ast
import re

from pages import ROOT, prose, read

PAGE = "docs/troubleshooting.md"


def source_strings() -> list[str]:
    """Every string of the sources, its variable parts as `…`."""
    found = []
    for path in sorted((ROOT / "src/fewbits").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                found.append(
                    "".join(str(part.value) if isinstance(part, ast.Constant) else "…" for part in node.values)
                )
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return found


def quoted(text: str) -> list[str]:
    """The messages of the tables: what is in backticks in the first cell of a row."""
    rows = re.findall(r"^\| `([^`]+)` \|", prose(text), flags=re.MULTILINE)
    return [row for row in rows if len(fixed_parts(row)) > 0]


def fixed_parts(message: str) -> list[str]:
    return [part for part in (part.strip() for part in message.split("…")) if len(part) > 2]


def said(message: str, strings: list[str]) -> bool:
    """Whether one string has all fixed parts of a message, in their order."""
    pattern = re.compile(".*".join(map(re.escape, fixed_parts(message))), re.DOTALL)
    return any(pattern.search(string) for string in strings)


def test_every_quoted_message_is_in_the_sources() -> None:
    messages, strings = quoted(read(PAGE)), source_strings()
    assert len(messages) > 50
    assert [message for message in messages if not said(message, strings)] == []


def test_a_message_that_is_gone_is_seen() -> None:
    strings = ["…: has no config.json; copy it", "is … already"]
    assert said("has no config.json", strings)
    assert said("is … already", strings)
    assert not said("has no config.toml", strings)
    assert not said("copy it … config.json", strings)
