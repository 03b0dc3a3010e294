"""The front door: every name is there, and what needs no torch does not load it."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import fewbits

HEAVY = ("torch", "transformers", "numpy")


@pytest.mark.parametrize("name", fewbits.__all__)
def test_every_public_name_is_there(name: str) -> None:
    assert getattr(fewbits, name) is not None
    assert name in dir(fewbits)


def test_the_names_for_type_checkers_are_the_public_names() -> None:
    tree = ast.parse(Path(fewbits.__file__).read_text())
    checked = next(node for node in tree.body if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test))
    homes = {}
    for node in checked.body:
        assert isinstance(node, ast.ImportFrom)
        for alias in node.names:
            assert alias.name == alias.asname, "an import is a re-export only as `import X as X`"
            homes[alias.name] = node.module
    # A module needs no import for a type checker: it is found as a file.
    names = {name for name in fewbits.__all__ if name != "formats"}
    assert homes == {name: fewbits._HOMES[name] for name in names}
    assert len(fewbits.__all__) == len(set(fewbits.__all__))


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="'fewbits' has no attribute 'quantise'"):
        fewbits.quantise  # noqa: B018
    assert not hasattr(fewbits, "__wrapped__")


def loaded_by(code: str) -> set[str]:
    """Which heavy modules a fresh Python has loaded after this code."""
    report = f"import sys; print(*[name for name in {HEAVY!r} if name in sys.modules], file=sys.stderr)"
    code = f"try:\n    {code}\nexcept SystemExit as ended:\n    assert not ended.code, ended.code\n{report}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return set(done.stderr.split())


def command(*arguments: str) -> str:
    return f"import sys; sys.argv = {['fewbits', *arguments]!r}; from fewbits.cli import main; main()"


@pytest.mark.parametrize(
    "code",
    [
        "import fewbits; fewbits.Format.named('fp16'); fewbits.formats.names(); fewbits.FewbitsError",
        command("--help"),
        command("convert", "--help"),
        command("formats"),
        command("formats", "fp16"),
        command("show", "0.1"),
    ],
)
def test_loads_neither_torch_nor_transformers(code: str) -> None:
    assert loaded_by(code) == set()


def test_loading_torch_is_seen() -> None:
    assert loaded_by("import fewbits; fewbits.round_to") >= {"torch"}
