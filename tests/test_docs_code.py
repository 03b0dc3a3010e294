"""What the pages show is run: every Python block and every command, page by page, on tiny models under the names shown.

A page is one session in one folder: its blocks follow one another. `# -> value` after an expression is what it must be.
A block that is not run says why in a comment above it, `<!-- not run: it needs a GPU -->`.
"""

from __future__ import annotations

import ast
import io
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from models.tiny_chatglm import save as save_tiny_chatglm
from models.tiny_sentencepiece import write_sentencepiece
from pages import DOCS, FRONT, blocks, commands, prose, read

MODELS = ("MODEL", "Qwen/Qwen3-0.6B", "qwen")
"""Names that pages give to a model; here each is a folder, so nothing is fetched."""

NOT_RUN = {("explore", "--open"), ("explore",)}
"""Commands that would not end by themselves; that they parse is tested with all others."""

RESULTS = ("compare", "doctor", "formats", "generate", "plan", "preflight", "show", "train")
"""Commands that later blocks do not need: each such line is run once, on the first page that has it."""

TEXT = "\n".join(f"Precision is a budget: {i} bits and {i} more are {2 * i} bits." for i in range(400))


@pytest.fixture(scope="module")
def model(save_tiny: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model whose context holds the windows that commands take unasked."""
    folder = tmp_path_factory.mktemp("pages") / "model"
    save_tiny(folder, max_position_embeddings=1024)
    return folder


@pytest.fixture
def session(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with models and a text under the names that the pages use; it is the current one."""
    for name in MODELS:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).symlink_to(model, target_is_directory=True)
    (tmp_path / "THUDM").mkdir()
    save_tiny_chatglm(tmp_path / "THUDM/chatglm3-6b")
    write_sentencepiece(tmp_path / "THUDM/chatglm3-6b/tokenizer.model")
    (tmp_path / "my.txt").write_text(TEXT)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FEWBITS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))
    return tmp_path


@pytest.fixture(scope="module")
def done() -> set[tuple[str, ...]]:
    return set()


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page in (*FRONT, *DOCS) if "```" in read(page)])
def test_the_code_runs(page: str, session: Path, done: set[tuple[str, ...]], run_cli: Callable[..., Any]) -> None:
    torch.manual_seed(0)
    names: dict[str, Any] = {"__name__": "page"}
    for block in blocks(read(page)):
        if block.why_not is None and block.language == "python":
            run_python(block.code, f"{page}:{block.line}", names)
        elif block.why_not is None and block.language == "sh":
            for arguments in commands(block.code):
                if tuple(arguments) not in NOT_RUN | done:
                    ran = run_cli(*shorter(arguments), *replacing(arguments))
                    done |= {tuple(arguments)} if arguments[0] in RESULTS else set()
                    assert ran.code == 0, f"{page}: fewbits {' '.join(arguments)}: {ran.err}"


def shorter(arguments: list[str]) -> list[str]:
    """The same command with fewer training steps."""
    return [("3" if before == "--steps" else each) for before, each in zip(["", *arguments], arguments, strict=False)]


def replacing(arguments: list[str]) -> list[str]:
    """What lets a conversion replace a model that an earlier line made: such lines are alternatives."""
    there = arguments[0] == "convert" and Path(arguments[2]).exists()
    return ["--overwrite"] if there and "--overwrite" not in arguments else []


def run_python(code: str, where: str, names: dict[str, Any]) -> None:
    """Run a block statement by statement; an expression with `# -> value` after it must have that value."""
    lines = code.splitlines()
    for statement in ast.parse(code, where).body:
        remark = re.search(r"#\s*->\s*(.+)$", lines[statement.end_lineno - 1])  # type: ignore[operator]
        if isinstance(statement, ast.Expr) and remark:
            value = eval(compile(ast.Expression(statement.value), where, "eval"), names)
            assert shown(value) == remark[1], f"{where}: {ast.unparse(statement)}"
        else:
            assert remark is None, f"{where}: `# ->` is for expressions, and this is none: {ast.unparse(statement)}"
            exec(compile(ast.Module([statement], []), where, "exec"), names)


def shown(value: object) -> str:
    """As the pages show a value: a tensor as its numbers, six digits of a float, on one line."""
    if isinstance(value, torch.Tensor):
        value = value.tolist()
    if isinstance(value, list):
        return f"[{', '.join(map(shown, value))}]"
    return f"{value:.6g}" if isinstance(value, float) else repr(value)


@pytest.mark.parametrize("page", [*FRONT, *DOCS])
def test_blocks_have_a_language(page: str) -> None:
    unknown = {block.line: block.language for block in blocks(read(page))}
    assert {line: lang for line, lang in unknown.items() if lang not in ("python", "sh", "text", "json", "cpp")} == {}


@pytest.mark.parametrize("page", [*FRONT, *DOCS])
def test_commands_are_in_fences(page: str) -> None:
    """In a block that is only indented they would not be run."""
    assert re.findall(r"^ +(?:\$ )?fewbits [a-z].*", prose(read(page)), flags=re.MULTILINE) == []


def test_a_wrong_value_is_seen() -> None:
    run_python("x = 2\nx + 1  # -> 3\n[x / 4, x]  # -> [0.5, 2]\n", "here", {})
    with pytest.raises(AssertionError, match="here: x"):
        run_python("x = 2\nx  # -> 3\n", "here", {})
    with pytest.raises(AssertionError, match="is for expressions"):
        run_python("x = 2  # -> 2\n", "here", {})


def test_blocks_are_found() -> None:
    text = "a\n\n```python\nx = 1\n```\n\n- item\n\n  ```sh\n  fewbits doctor\n  ```\n"
    text += "\n<!-- not run: GPU -->\n```python\ny\n```\n"
    found = blocks(text)
    assert [(block.language, block.code, block.line) for block in found] == [
        ("python", "x = 1\n", 4),
        ("sh", "fewbits doctor\n", 10),
        ("python", "y\n", 15),
    ]
    assert [block.why_not for block in found] == [None, None, "GPU"]
