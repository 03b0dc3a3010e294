"""`fewbits preflight`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from fewbits.cli.app import MODEL, app, progress_bar, refuse_unwritable, write_json
from fewbits.errors import FewbitsError


@app.command()
def preflight(
    model: Annotated[str, typer.Argument(help=MODEL)],
    text: Annotated[
        Path | None, typer.Option(help="The UTF-8 text that you will train on; without it, a built-in one.")
    ] = None,
    precision: Annotated[str, typer.Option(help="What you will train in: fp16, bf16 or fp8.")] = "fp16",
    steps: Annotated[int, typer.Option(min=1, help="Forward and backward passes in fp32.")] = 4,
    length: Annotated[int, typer.Option(min=2, help="Tokens in a window; take that of your training.")] = 256,
    batch: Annotated[int, typer.Option(min=1, help="Windows in a step; take that of your training.")] = 4,
    keep: Annotated[
        list[str] | None, typer.Option(help="Layers that you will keep in a wider format, * matches anything.")
    ] = None,
    json: Annotated[Path | None, typer.Option(help="Write every histogram and figure here.")] = None,
    report: Annotated[
        Path | None, typer.Option(help="Write heat maps, layers × exponents, here: a .html or a .png file.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, max=2**63 - 1, help="Of dropout, where a model has it.")] = 0,
) -> None:
    """Tell which layers would under- or overflow in a lower precision, before you train in it."""
    import torch

    from fewbits.measure.text import text_name, token_windows
    from fewbits.models.load import AutoModelForCausalLM
    from fewbits.models.source import open_source
    from fewbits.report.preflight import preflight_table
    from fewbits.train.preflight import check_recipe
    from fewbits.train.preflight import preflight as run

    refuse_unwritable(json)
    _check_report(report)
    recipe = check_recipe(precision, keep or ())
    tokenizer = open_source(model).tokenizer()
    windows = token_windows(tokenizer, text, steps * batch, length)
    with progress_bar("loading", in_bytes=True) as loading:
        loaded = AutoModelForCausalLM.from_pretrained(model, precision="fp32", progress=loading)
    torch.manual_seed(seed)
    loaded.requires_grad_(True).train()
    batches = [{"input_ids": ids, "labels": ids, "use_cache": False} for ids in torch.split(windows, batch)]
    with progress_bar("preflight") as step:
        found = run(loaded, batches, recipe, progress=step)
    data = found.to_json() | {
        "model": model, "text": text_name(text), "batch": min(batch, len(windows)), "length": length, "seed": seed,
    }  # fmt: skip
    if json is not None:
        write_json(json, data)
    _write_report(data, report)
    Console().print(preflight_table(data))


def _check_report(path: Path | None) -> None:
    """Find a wrong report file, or a library that is missing, before minutes of work."""
    if path is None:
        return
    if path.suffix not in (".html", ".png"):
        raise FewbitsError(f"--report: {path} is neither .html nor .png; name a file of one of these kinds")
    if not path.absolute().parent.is_dir():
        raise FewbitsError(f"--report: the folder {path.parent} does not exist; make it first")
    if path.is_dir():
        raise FewbitsError(f"--report: {path} is a folder; give a file name")
    if path.suffix == ".png":
        from fewbits.report.heat_map_png import check_png

        check_png()


def _write_report(data: dict[str, Any], path: Path | None) -> None:
    from fewbits.report.heat_map_html import write_html
    from fewbits.report.heat_map_png import write_png

    if path is not None:
        (write_png if path.suffix == ".png" else write_html)(data, path)
