"""`fewbits compare`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from fewbits.cli.app import MODEL, app, progress_bar, refuse_unwritable, write_json


@app.command()
def compare(
    reference: Annotated[str, typer.Argument(help=f"The original. {MODEL}")],
    candidates: Annotated[list[str] | None, typer.Argument(help="Converted models.")] = None,
    quantized: Annotated[
        list[str] | None,
        typer.Option("--as", help="Precisions, as int8,int4: the original quantized while it is loaded, beside them."),
    ] = None,
    text: Annotated[Path | None, typer.Option(help="UTF-8 text to measure on; without it, a built-in one.")] = None,
    windows: Annotated[int, typer.Option(min=1, help="Windows of text at most.")] = 8,
    tokens: Annotated[
        int, typer.Option(min=2, help="Tokens in a window, and in the prompt that is timed; at most the context.")
    ] = 512,
    speed: Annotated[
        bool, typer.Option("--speed/--no-speed", help="Time the models, and look at their memory.")
    ] = True,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    json: Annotated[Path | None, typer.Option(help="Write the figures here, of every token too.")] = None,
    report: Annotated[Path | None, typer.Option(help="Write them as a page here: a .html file.")] = None,
) -> None:
    """Show original and converted models side by side: size, KL divergence, perplexity, tokens per second."""
    from fewbits.measure.compare import compare as run
    from fewbits.report.comparison import refuse_report, write_report
    from fewbits.report.comparison_tables import comparison_table

    refuse_unwritable(json)
    refuse_report(report)
    precisions = [name.strip() for each in quantized or () for name in each.split(",")]
    with progress_bar("comparing") as step:
        result = run(
            reference, candidates or (), text, precisions=precisions, windows=windows, window_tokens=tokens,
            with_speed=speed, device=device, progress=lambda what, done, total: step(done, total, what),
        )  # fmt: skip
    if json is not None:
        write_json(json, result.to_json())
    if report is not None:
        write_report(result.to_json(), report)
    Console().print(comparison_table(result))
