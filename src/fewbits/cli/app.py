"""What the commands share: the application, errors and exit codes, progress, files of JSON."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from io import TextIOWrapper
from json import dumps
from pathlib import Path
from typing import Any, NoReturn

import typer
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from fewbits.errors import FewbitsError

INTERRUPTED = 130  # the exit code after Ctrl-C: 128 + SIGINT
PRECISION = "int8, int8-weight, int4, nf4, mxfp4, fp8, bf16, fp16 or fp32; without it, as stored."
MODEL = "A Hub id, a folder, or a .gguf file."

app = typer.Typer(
    name="fewbits",
    help="Large models in few bits.",
    invoke_without_command=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)


# Typer brings its own Click or uses the installed one, by version: the base of its errors is found, not imported.
_UsageError: Any = next(base for base in typer.BadParameter.__mro__ if base.__name__ == "ClickException")


@app.callback()
def _help(context: typer.Context) -> None:
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


def main() -> NoReturn:
    """Run the command line; turn errors into one line on stderr and an exit code."""
    if isinstance(sys.stdout, TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal without × still gets the table
    try:
        if app(standalone_mode=False) == INTERRUPTED:  # some versions of Typer turn Ctrl-C into this result
            raise KeyboardInterrupt
    except FewbitsError as error:
        fail(str(error), 2)
    except _UsageError as error:
        fail(f"{error.format_message().rstrip('.')}; see fewbits --help", 2)
    except OSError as error:
        fail(str(error), 1)
    except (KeyboardInterrupt, typer.Abort):
        fail("interrupted", INTERRUPTED)
    sys.exit(0)


def to_stderr(*words: str, style: str | None = None) -> None:
    """Print a line that is not data."""
    Console(stderr=True, soft_wrap=True, highlight=False, markup=False, emoji=False).print(*words, style=style)


def fail(message: str, code: int) -> NoReturn:
    """Say what went wrong in one line, and leave."""
    one_line = " ".join(message.split())
    to_stderr("error:", one_line)
    sys.exit(code)


@contextmanager
def progress_bar(what: str, *, in_bytes: bool = False) -> Iterator[Callable[..., None]]:
    """A progress bar on stderr, on a terminal only; gives a function of (done, total, description)."""
    console = Console(stderr=True)
    counter = DownloadColumn() if in_bytes else MofNCompleteColumn()
    columns = (TextColumn("{task.description}"), BarColumn(), counter, TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task(what, total=None)

        def step(done: int, total: int, description: str = what) -> None:
            progress.update(task, completed=done, total=total, description=description)

        yield step


def refuse_unwritable(path: Path | None) -> None:
    """Find a wrong output file before minutes of work, not after."""
    if path is not None and not path.absolute().parent.is_dir():
        raise FewbitsError(f"--json: the folder {path.parent} does not exist; make it first")
    if path is not None and path.is_dir():
        raise FewbitsError(f"--json: {path} is a folder; give a file name")


def write_json(path: Path, data: dict[str, Any]) -> None:
    """Write what `--json` asked for."""
    path.write_text(dumps(data, indent=1) + "\n")
