"""The command line: parse, call one function, print.

Exit codes: 0 done, 1 the work failed (a full disk, say), 2 bad input or usage, 130 interrupted. Data goes to
stdout; errors and progress go to stderr, an error as one line.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from io import TextIOWrapper
from json import dumps
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from fewbits.errors import FewbitsError, OverflowWarning

_INTERRUPTED = 130  # the exit code after Ctrl-C: 128 + SIGINT
PRECISION = "int8, int8-weight, int4, nf4, fp8, bf16, fp16 or fp32; without it, as stored."
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
        _write_json(json, {"formats": formats_data([name] if name else None)})
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
        _write_json(json, number_data(number, formats.split(","), rounding))
    Console().print(number_table(number, formats.split(","), rounding))


@app.command()
def convert(
    model: Annotated[str, typer.Argument(help=MODEL)],
    out: Annotated[Path, typer.Argument(help="The folder to write; of --layout gguf, the file.")],
    to: Annotated[
        str, typer.Option(help="int8 (weights and activations), int8-weight, int4, fp8; or a cast: bf16, fp16, fp32.")
    ] = "int8",
    layout: Annotated[
        str, typer.Option(help="How it is written: compressed-tensors, bitsandbytes or gguf.")
    ] = "compressed-tensors",
    keep: Annotated[list[str] | None, typer.Option(help="Modules not to quantize, * matches anything.")] = None,
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

    _refuse_unwritable(json)
    console = Console()
    try:
        with _progress("converting", in_bytes=True) as step, warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always", OverflowWarning)
            done = run(
                model, out, to, layout=layout, keep=keep or (), overflow=overflow, allow_nonfinite=allow_nonfinite,
                overwrite=overwrite, revision=revision, trust_remote_code=trust_remote_code, progress=step,
                on_manifest=lambda rows: console.print(manifest_table(rows)),
            )  # fmt: skip
    except KeyboardInterrupt as stop:  # here, since Typer does not pass on what it says
        _fail("; ".join(["interrupted", *getattr(stop, "__notes__", ())]), _INTERRUPTED)
    if json is not None:
        _write_json(json, {"path": str(done.path), "to": to, "nbytes": done.nbytes,
                           "manifest": [asdict(row) for row in done.manifest],
                           "casts": [asdict(cast) for cast in done.casts]})  # fmt: skip
    if done.casts:
        console.print(cast_table(done.casts))
    for warning in told:
        _to_stderr("WARNING:", str(warning.message), style="bold red")
    if done.rounding is not None:
        typer.echo(f"note: {done.rounding}")
    typer.echo(f"wrote {done.path}: {to}, {human_bytes(done.nbytes)} of weights")


@app.command()
def compare(
    reference: Annotated[str, typer.Argument(help=f"The original. {MODEL}")],
    candidates: Annotated[list[str], typer.Argument(help="Converted models.")],
    text: Annotated[Path | None, typer.Option(help="UTF-8 text to measure on; without it, a built-in one.")] = None,
    json: Annotated[Path | None, typer.Option(help="Write the figures here.")] = None,
) -> None:
    """Show original and converted models side by side: size, KL divergence, perplexity, tokens per second."""
    from fewbits.measure.compare import compare as run
    from fewbits.report.terminal import comparison_table

    _refuse_unwritable(json)
    with _progress("comparing") as step:
        result = run(reference, candidates, text, progress=lambda what, done, total: step(done, total, what))
    if json is not None:
        _write_json(json, result.to_json())
    Console().print(comparison_table(result))


@app.command()
def generate(
    model: Annotated[str, typer.Argument(help=MODEL)],
    prompt: Annotated[str, typer.Argument(help="What you say to it.")],
    max_new_tokens: Annotated[
        int | None, typer.Option(min=1, help="Most tokens to write; without it, 256 or what the context leaves.")
    ] = None,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 takes the likeliest token each time.")] = 0.0,
    seed: Annotated[int, typer.Option(min=0, max=2**63 - 1, help="Of the draws, where temperature is above 0.")] = 0,
    precision: Annotated[str | None, typer.Option(help=PRECISION)] = None,
    raw: Annotated[bool, typer.Option("--raw", help="No chat template: continue the prompt as it is.")] = False,
) -> None:
    """Let a model answer a prompt; its chat template is applied."""
    from fewbits.models.generate import check_prompt, generate_text
    from fewbits.models.load import AutoModelForCausalLM
    from fewbits.models.source import open_source

    source = open_source(model)
    tokenizer = source.tokenizer()
    check_prompt(source.config, tokenizer, prompt, max_new_tokens=max_new_tokens, use_chat_template=not raw)
    with _progress("loading", in_bytes=True) as step:
        loaded = AutoModelForCausalLM.from_pretrained(model, precision=precision, progress=step)

    def write(piece: str) -> None:
        sys.stdout.write(piece)
        sys.stdout.flush()

    generate_text(
        loaded, tokenizer, prompt, max_new_tokens=max_new_tokens, temperature=temperature, seed=seed,
        use_chat_template=not raw, write=write,
    )  # fmt: skip
    write("\n")


@app.command()
def chat(
    model: Annotated[str, typer.Argument(help=MODEL)],
    system: Annotated[str | None, typer.Option(help="What the model is told before the first turn.")] = None,
    max_new_tokens: Annotated[
        int | None, typer.Option(min=1, help="Most tokens in an answer; without it, 1024 or what the context leaves.")
    ] = None,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 takes the likeliest token each time.")] = 0.7,
    seed: Annotated[int, typer.Option(min=0, max=2**63 - 1, help="Of the draws, where temperature is above 0.")] = 0,
    precision: Annotated[str | None, typer.Option(help=PRECISION)] = None,
) -> None:
    """Talk with a model; Ctrl-C stops an answer, Ctrl-D ends. From a pipe, each line is a turn."""
    from fewbits.models.chat import Conversation, check_chat
    from fewbits.models.load import AutoModelForCausalLM
    from fewbits.models.source import open_source
    from fewbits.report.chat_loop import chat_loop

    source = open_source(model)
    tokenizer = source.tokenizer()
    check_chat(source.config, tokenizer, system=system, max_new_tokens=max_new_tokens)
    with _progress("loading", in_bytes=True) as step:
        loaded = AutoModelForCausalLM.from_pretrained(model, precision=precision, progress=step)
    chat_loop(
        Conversation(
            loaded, tokenizer, system=system, max_new_tokens=max_new_tokens, temperature=temperature, seed=seed
        )
    )


@app.command()
def doctor(json: Annotated[Path | None, typer.Option(help="Write it here.")] = None) -> None:
    """Tell what this machine has: versions, cores, memory, the live instruction set, GPUs."""
    from fewbits.measure.machine import this_machine
    from fewbits.report.terminal import machine_table

    _refuse_unwritable(json)
    machine = this_machine()
    if json is not None:
        _write_json(json, machine.to_json())
    Console().print(machine_table(machine))


def main() -> NoReturn:
    """Run the command line; turn errors into one line on stderr and an exit code."""
    if isinstance(sys.stdout, TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal without × still gets the table
    try:
        if app(standalone_mode=False) == _INTERRUPTED:  # some versions of Typer turn Ctrl-C into this result
            raise KeyboardInterrupt
    except FewbitsError as error:
        _fail(str(error), 2)
    except _UsageError as error:
        _fail(f"{error.format_message().rstrip('.')}; see fewbits --help", 2)
    except OSError as error:
        _fail(str(error), 1)
    except (KeyboardInterrupt, typer.Abort):
        _fail("interrupted", _INTERRUPTED)
    sys.exit(0)


def _to_stderr(*words: str, style: str | None = None) -> None:
    Console(stderr=True, soft_wrap=True, highlight=False, markup=False, emoji=False).print(*words, style=style)


def _fail(message: str, code: int) -> NoReturn:
    one_line = " ".join(message.split())
    _to_stderr("error:", one_line)
    sys.exit(code)


@contextmanager
def _progress(what: str, *, in_bytes: bool = False) -> Iterator[Callable[..., None]]:
    """A progress bar on stderr, on a terminal only; gives a function of (done, total, description)."""
    console = Console(stderr=True)
    counter = DownloadColumn() if in_bytes else MofNCompleteColumn()
    columns = (TextColumn("{task.description}"), BarColumn(), counter, TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task(what, total=None)

        def step(done: int, total: int, description: str = what) -> None:
            progress.update(task, completed=done, total=total, description=description)

        yield step


def _refuse_unwritable(path: Path | None) -> None:
    """Find a wrong output file before minutes of work, not after."""
    if path is not None and not path.absolute().parent.is_dir():
        raise FewbitsError(f"--json: the folder {path.parent} does not exist; make it first")
    if path is not None and path.is_dir():
        raise FewbitsError(f"--json: {path} is a folder; give a file name")


def _write_json(path: Path, data: dict[str, Any]) -> None:
    path.write_text(dumps(data, indent=1) + "\n")
