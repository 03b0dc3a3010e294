"""The command line: parse, call one function, print.

Exit codes: 0 done, 1 the work failed (a full disk, say), 2 bad input or usage, 130 interrupted. Data goes to
stdout; errors and progress go to stderr, an error as one line.
"""

from __future__ import annotations

import sys
from typing import Annotated, NoReturn

import typer
from rich.console import Console

from fewbits.errors import FewbitsError

app = typer.Typer(
    name="fewbits",
    help="Large models in few bits.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)


@app.command()
def formats(
    name: Annotated[str | None, typer.Argument(help="One format, with its bit layout drawn.")] = None,
) -> None:
    """List the number formats: bits, range, precision, memory; or show one."""
    from fewbits.report.formats import formats_table, one_format

    Console().print(formats_table() if name is None else one_format(name))


@app.command(context_settings={"ignore_unknown_options": True})  # -1.5 is a number
def show(
    number: Annotated[str, typer.Argument(help="0.1, 1/3, inf, a hex float (0x1.8p-3) or bits (0x3C00, bf16:0x3C00).")],
    formats: Annotated[str, typer.Option("--in", help="Formats, separated by commas.")] = "fp32,fp16,bf16,e5m2,e4m3fn",
    rounding: Annotated[
        str, typer.Option(help="nearest_even, nearest_away, toward_zero, up, down or stochastic.")
    ] = "nearest_even",
) -> None:
    """Show one number as each format sees it: bits, the value it becomes, the error, the neighbours."""
    from fewbits.report.formats import number_table

    Console().print(number_table(number, formats.split(","), rounding))


def main() -> NoReturn:
    """Run the command line; turn errors into one line on stderr and an exit code."""
    try:
        app()
    except FewbitsError as error:
        _fail(str(error), 2)
    except OSError as error:
        _fail(str(error), 1)
    except KeyboardInterrupt:
        _fail("interrupted", 130)
    sys.exit(0)


def _fail(message: str, code: int) -> NoReturn:
    Console(stderr=True, soft_wrap=True, highlight=False).print(f"[red]error:[/red] {message}")
    sys.exit(code)
