"""`fewbits train`."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from fewbits.cli.app import INTERRUPTED, MODEL, app, fail, progress_bar, refuse_unwritable, to_stderr, write_json

if TYPE_CHECKING:
    from fewbits.measure.training import TrainingCost
    from fewbits.train.loop import StepReport


@app.command()
def train(
    model: Annotated[str, typer.Argument(help=MODEL)],
    text: Annotated[Path, typer.Option(help="A UTF-8 file to train on.")],
    out: Annotated[Path, typer.Option(help="The folder to write; checkpoints are beside it, in OUT.checkpoints.")],
    precision: Annotated[str, typer.Option(help="What is computed in: fp16, bf16, fp8 or fp32.")] = "bf16",
    steps: Annotated[int, typer.Option(min=1, help="Optimizer steps, skipped ones included.")] = 100,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the newest checkpoint, with the same bits.")
    ] = False,
    lora: Annotated[
        int | None, typer.Option(min=1, help="Train adapters of this rank; the model stays as it is.")
    ] = None,
    base_precision: Annotated[
        str | None,
        typer.Option(help="With --lora, the model under the adapters: int8, int4, …; without it, as stored."),
    ] = None,
    batch: Annotated[int, typer.Option(min=1, help="Windows of text in a forward pass.")] = 4,
    length: Annotated[int, typer.Option(min=2, help="Tokens in a window.")] = 256,
    accumulate: Annotated[int, typer.Option(min=1, help="Forward passes in a step.")] = 1,
    lr: Annotated[float | None, typer.Option(help="Largest learning rate; without it 5e-5, with --lora 2e-4.")] = None,
    seed: Annotated[int, typer.Option(min=0, max=2**32 - 1, help="Of all that is random.")] = 0,
    save_every: Annotated[
        int | None, typer.Option(min=1, help="Steps between checkpoints; without it, a tenth of all.")
    ] = None,
    no_baseline: Annotated[
        bool, typer.Option("--no-baseline", help="Do not measure what the same run costs in FP32.")
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace a model that is there, and an earlier run's checkpoints.")
    ] = False,
    json: Annotated[Path | None, typer.Option(help="Write every step, memory and time here.")] = None,
) -> None:
    """Train a model on a text in mixed precision: FP32 master weights, FP16, BF16 or FP8 compute."""
    from fewbits.measure.training import fp32_cost, training_cost
    from fewbits.report.training import cost_line, summary_line, training_data
    from fewbits.train.run import train as run
    from fewbits.train.settings import Settings

    refuse_unwritable(json)
    settings = Settings(
        model=model, text=str(text), precision=precision, steps=steps, batch=batch, length=length,
        accumulate=accumulate, lr=lr, seed=seed, lora=lora, base_precision=base_precision, save_every=save_every,
    )  # fmt: skip
    costs: list[TrainingCost] = []
    try:
        with progress_bar("loading", in_bytes=True) as loading, _bar(steps) as show, _asked_to_stop() as should_stop:
            reports = run(
                settings, out, resume=resume, overwrite=overwrite, progress=loading, on_step=show,
                should_stop=should_stop, on_trained=lambda loop: costs.append(training_cost(loop)),
            )  # fmt: skip
    except KeyboardInterrupt as stop:  # here, since Typer does not pass on what it says
        fail("; ".join(["interrupted", *getattr(stop, "__notes__", ())]), INTERRUPTED)
    name = precision if lora is None else f"LoRA in {precision}"
    typer.echo(f"wrote {out}: {summary_line(reports, name)}")
    baseline = None
    if not no_baseline and settings != settings.in_fp32():
        with progress_bar("measuring fp32"):
            baseline = fp32_cost(settings)
        if baseline is None:
            to_stderr(
                "WARNING:",
                "the same run in fp32 died, as it does where memory is short: no comparison",
                style="bold red",
            )
    if json is not None:
        write_json(json, {"path": str(out), **training_data(settings.to_json(), reports, costs[0], baseline)})
    typer.echo(cost_line(name, costs[0], baseline))


@contextmanager
def _bar(steps: int) -> Iterator[Callable[[StepReport], None]]:
    """A progress bar on stderr, on a terminal only; gives a function of what each step did."""
    from fewbits.report.training import progress_line

    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    reports: list[StepReport] = []
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("training", total=steps, visible=False)

        def show(report: StepReport) -> None:
            reports.append(report)
            progress.update(task, completed=report.step, description=progress_line(reports), visible=True)

        yield show


@contextmanager
def _asked_to_stop() -> Iterator[Callable[[], bool]]:
    """Ctrl-C lets the step end, so that all of it can be saved; a second one stops at once."""
    asked = False

    def ask(number: int, frame: Any) -> None:
        nonlocal asked
        if asked:
            raise KeyboardInterrupt
        asked = True
        to_stderr("stopping after this step; Ctrl-C again stops at once")

    before = signal.signal(signal.SIGINT, ask)
    try:
        yield lambda: asked
    finally:
        signal.signal(signal.SIGINT, before)
