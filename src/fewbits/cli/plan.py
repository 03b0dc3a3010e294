"""`fewbits plan`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from fewbits.cli.app import MODEL, app, fail, refuse_unwritable, write_json


@app.command()
def plan(
    model: Annotated[str, typer.Argument(help=f"{MODEL} Of a Hub id only config.json is downloaded.")],
    memory: Annotated[
        str | None, typer.Option(help="What there is, such as 24GiB; without it, this machine's RAM and GPUs.")
    ] = None,
    context: Annotated[
        int | None, typer.Option(help="Tokens of each text; without it 4096, or the model's limit if that is less.")
    ] = None,
    batch: Annotated[int, typer.Option(help="Texts at once.")] = 1,
    train: Annotated[bool, typer.Option("--train", help="Plan training too: masters, gradients, optimizer state.")] = (
        False
    ),
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of a Hub id.")] = None,
    json: Annotated[Path | None, typer.Option(help="Write the plan here.")] = None,
) -> None:
    """Tell what fits in memory, in every precision, before anything is downloaded. Exits with 1 if nothing does."""
    from fewbits.measure.plan import plan as run
    from fewbits.report.plan import plan_table

    refuse_unwritable(json)
    found = run(model, memory=memory, context=context, batch=batch, train=train, revision=revision)
    if json is not None:
        write_json(json, found.to_json())
    Console().print(plan_table(found))
    if not found.something_fits:
        fail(found.why_nothing_fits(), 1)
