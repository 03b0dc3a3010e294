"""Every path of the repository that a page names exists, and every command that it shows parses."""

import re

import pytest
import typer

from fewbits.cli import app
from pages import PAGES, ROOT, blocks, commands, prose, read

SOURCES = ("src", "csrc", "tests", "benchmarks", "tools", "examples", "docs")
FOLDERS = {entry.name for entry in ROOT.iterdir() if entry.is_dir()} - {"build"}  # build holds what make makes


def named_paths(text: str) -> set[str]:
    """What looks like a path of the repository in `backticks`; links have a test of their own."""
    paths = set()
    for path in re.findall(r"`([^`\s]+)`", prose(text)):
        first, slash, _ = path.partition("/")
        is_file = re.fullmatch(r"[\w.-]+\.(md|py|toml|txt|yaml|cpp|hpp)|Makefile|LICENSE", path)
        if (slash and (first in FOLDERS or first == "fewbits")) or is_file:
            paths.add(path)
    return paths


def exists(path: str) -> bool:
    """Whether it is there: from the root, or, as prose abbreviates, from the package; `*` and `{a,b}` may be in it.

    A bare file name is one of any folder of sources.
    """
    braces = re.search(r"\{([^}]*)\}", path)
    if braces:
        return all(exists(path.replace(braces.group(), part, 1)) for part in braces.group(1).split(","))
    pattern = path.rstrip("/")
    if any(any(root.glob(pattern)) for root in (ROOT, ROOT / "src", ROOT / "src/fewbits")):
        return True
    return "/" not in path and any(any((ROOT / folder).rglob(path)) for folder in SOURCES)


def shown_commands(text: str) -> list[list[str]]:
    return [command for block in blocks(text) for command in commands(block.code)]


def refusal(arguments: list[str]) -> str | None:
    """Why the command line does not parse, or None; nothing is run."""
    group = typer.main.get_command(app)
    name, rest = (arguments[0], arguments[1:]) if not arguments[0].startswith("-") else ("", arguments)
    command = group.commands.get(name) if name else group  # type: ignore[attr-defined]
    if command is None:
        return f"no command {name!r}"
    if name and "--help" in rest:
        return None
    try:
        command.make_context(name, rest, resilient_parsing=False)
    except typer.Exit:
        return None
    except Exception as error:  # Click's errors, from whichever Click typer has
        return getattr(error, "format_message", error.__str__)()
    return None


@pytest.mark.parametrize("page", PAGES)
def test_every_path_exists(page: str) -> None:
    assert [path for path in sorted(named_paths(read(page))) if not exists(path)] == []


@pytest.mark.parametrize("page", PAGES)
def test_every_command_parses(page: str) -> None:
    shown = shown_commands(read(page))
    assert {" ".join(command): why for command in shown if (why := refusal(command))} == {}


def test_paths_are_found_in_prose() -> None:
    text = "See `src/fewbits/cli/app.py` and `csrc/{a,b}.cpp`; `fp16` and `x/y` are none.\n"
    text += "```\n`src/in_a_block.py`\n```\n"
    assert named_paths(text) == {"src/fewbits/cli/app.py", "csrc/{a,b}.cpp"}
    assert exists("src/fewbits/cli/app.py")
    assert exists("models/load.py")
    assert exists("csrc/*.cpp")
    assert exists("bench_cast.py")
    assert not exists("bench_cats.py")
    assert exists("tests/test_{layers,front_door}.py")
    assert not exists("docs/gone.md")
    assert not exists("tests/test_{layers,gone}.py")


def test_commands_are_found_in_blocks() -> None:
    text = (
        "```sh\n$ fewbits show 0.1 \\\n  --in fp16   # a remark\nfewbits convert a b --to int8 > log\nfewbitsy\n```\n"
    )
    text += "fewbits in prose\n"
    assert shown_commands(text) == [["show", "0.1", "--in", "fp16"], ["convert", "a", "b", "--to", "int8"]]


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (["convert", "a", "b", "--to", "int8"], None),
        (["formats", "--help"], None),
        (["convert", "a", "b", "--too", "int8"], "No such option"),
        (["convert", "a"], "Missing"),
        (["generate", "a", "b", "--max-new-tokens", "x"], "valid int"),
        (["converts", "a", "b"], "no command"),
    ],
)
def test_a_command_that_does_not_parse_is_seen(arguments: list[str], why: str | None) -> None:
    found = refusal(arguments)
    assert found is None if why is None else why in str(found)
