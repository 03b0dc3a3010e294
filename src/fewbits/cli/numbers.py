"""`fewbits formats` and `fewbits show`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from fewbits.cli.app import app, write_json
from fewbits.errors import FewbitsError


@app.command()
def formats(
    name: Annotated[str | None, typer.Argument(help="One format, with its bit layout drawn.")] = None,
    dialects: Annotated[bool, typer.Option("--dialects", help="Where other software differs about it.")] = False,
    json: Annotated[Path | None, typer.Option(help="Write the rows here.")] = None,
) -> None:
    """List the number formats: bits, range, precision, memory; or show one."""
    from fewbits.report.formats import dialects_table, formats_data, formats_table, one_format

    if dialects and name is None:
        raise FewbitsError("--dialects is about one format: fewbits formats e4m3fn --dialects")
    if json is not None:
        write_json(json, {"formats": formats_data([name] if name else None)})
    shown = formats_table() if name is None else dialects_table(name) if dialects else one_format(name)
    Console().print(shown)


@app.command(context_settings={"ignore_unknown_options": True})  # -1.5 is a number
def show(
    number: Annotated[str, typer.Argument(help="0.1, 1/3, inf, a hex float (0x1.8p-3) or bits (0x3C00, bf16:0x3C00).")],
    formats: Annotated[str, typer.Option("--in", help="Formats, separated by commas.")] = "fp32,fp16,bf16,e5m2,e4m3fn",
    rounding: Annotated[
        str, typer.Option(help="nearest_even, nearest_away, toward_zero, up, down or stochastic.")
    ] = "nearest_even",
    json: Annotated[Path | None, typer.Option(help="Write it here.")] = None,
) -> None:
    """Show one number as each format sees it: bits, the value it becomes, the error, the neighbours."""
    from fewbits.report.number import number_data, number_table

    if json is not None:
        write_json(json, number_data(number, formats.split(","), rounding))
    Console().print(number_table(number, formats.split(","), rounding))
