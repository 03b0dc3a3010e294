"""`fewbits doctor`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from fewbits.cli.app import app, refuse_unwritable, write_json


@app.command()
def doctor(json: Annotated[Path | None, typer.Option(help="Write it here.")] = None) -> None:
    """Tell what this machine has: versions, cores, memory, the live instruction set, GPUs."""
    from fewbits.measure.machine import this_machine
    from fewbits.report.terminal import machine_table

    refuse_unwritable(json)
    machine = this_machine()
    if json is not None:
        write_json(json, machine.to_json())
    Console().print(machine_table(machine))
