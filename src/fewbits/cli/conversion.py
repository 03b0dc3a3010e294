"""`fewbits convert`."""

from __future__ import annotations

import warnings
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from fewbits.cli.app import INTERRUPTED, MODEL, app, fail, progress_bar, refuse_unwritable, to_stderr, write_json
from fewbits.cli.contract import REPORT, Measured
from fewbits.errors import OverflowWarning


@app.command()
def convert(
    model: Annotated[str, typer.Argument(help=MODEL)],
    out: Annotated[Path, typer.Argument(help="The folder to write; of --layout gguf, the file.")],
    to: Annotated[
        str | None,
        typer.Option(
            help="int8 (the usual: weights and activations), int8-weight, int4, mxfp4, fp8; or a cast: bf16, fp16, "
            "fp32. With a contract, those to choose from, as int8,int4."
        ),
    ] = None,
    layout: Annotated[
        str, typer.Option(help="How it is written: compressed-tensors, bitsandbytes or gguf.")
    ] = "compressed-tensors",
    keep: Annotated[list[str] | None, typer.Option(help="Modules not to quantize, * matches anything.")] = None,
    rotate: Annotated[
        bool,
        typer.Option("--rotate", help="Rotate weights first: int8 and int4 are more accurate; only fewbits reads it."),
    ] = False,
    method: Annotated[
        str | None,
        typer.Option(
            help="absmax (the usual), mse (least error) or gptq (on text); quarot+… and smoothquant+… fold before."
        ),
    ] = None,
    calibrate: Annotated[
        Path | None, typer.Option(help="UTF-8 text for gptq and smoothquant; without it, a built-in one.")
    ] = None,
    max_kl: Annotated[
        float | None,
        typer.Option(help="A contract: search the smallest model of at most this KL to fp32, layer by layer."),
    ] = None,
    max_size: Annotated[
        str | None, typer.Option(help="A contract: search for the least loss in so many bytes, as 3GiB.")
    ] = None,
    overflow: Annotated[
        str | None,
        typer.Option(help="Beyond a cast's range: saturate or ieee (Inf); without it, the format's own rule."),
    ] = None,
    allow_nonfinite: Annotated[
        bool, typer.Option("--allow-nonfinite", help="Write the source's NaN and Inf as they are.")
    ] = False,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run the model's own code, where transformers needs it.")
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a model that is there.")] = False,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of a Hub id.")] = None,
    json: Annotated[Path | None, typer.Option(help="Write the manifest here.")] = None,
) -> None:
    """Convert a model to another precision, tensor by tensor."""
    from fewbits.quantize.convert import convert as run
    from fewbits.report.terminal import cast_table, human_bytes, manifest_table

    refuse_unwritable(json)
    console = Console()
    try:
        contract = max_kl is not None or max_size is not None
        with progress_bar("converting", in_bytes=not contract) as step, warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always", OverflowWarning)
            measured = (
                Measured(model, revision, lambda what, done, total: step(done, total, what)) if contract else None
            )
            done = run(
                model, out, to, layout=layout, keep=keep or (), rotate=rotate, method=method, calibrate=calibrate,
                max_kl=max_kl, max_size=max_size, overflow=overflow, allow_nonfinite=allow_nonfinite,
                on_search=None if measured is None else measured.progress,
                evaluate=None if measured is None else measured.kl,
                on_found=None if measured is None else measured.report,
                overwrite=overwrite, revision=revision, trust_remote_code=trust_remote_code, progress=step,
                on_manifest=lambda rows: console.print(manifest_table(rows)),
            )  # fmt: skip
    except KeyboardInterrupt as stop:  # here, since Typer does not pass on what it says
        fail("; ".join(["interrupted", *getattr(stop, "__notes__", ())]), INTERRUPTED)
    if json is not None:
        write_json(json, {"path": str(done.path), "to": done.precision, "nbytes": done.nbytes,
                           "manifest": [asdict(row) for row in done.manifest],
                           "casts": [asdict(cast) for cast in done.casts],
                           "search": None if measured is None else measured.found.to_json()})  # fmt: skip
    if done.casts:
        console.print(cast_table(done.casts))
    for warning in told:
        to_stderr("WARNING:", str(warning.message), style="bold red")
    if done.rounding is not None:
        typer.echo(f"note: {done.rounding}")
    size = f"{human_bytes(done.nbytes)} of weights"
    if measured is not None:
        typer.echo(f"{measured.say()}; figures in {done.path / REPORT} and README.md")
    typer.echo(f"wrote {done.path}: {done.precision}, {size}")
