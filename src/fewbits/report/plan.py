"""A plan in the terminal: what fits, in every precision, and what to run next."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.box import SIMPLE_HEAD
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from fewbits.measure.plan_accuracy import NEGLIGIBLE, SLIGHT, SOURCE
from fewbits.report.terminal import human_bytes

if TYPE_CHECKING:  # this module imports torch, which has no place here at run time
    from fewbits.measure.plan_data import Plan


def plan_table(plan: Plan) -> Group:
    """The precisions, ways of training where they were asked for, what it rests on, and the next command."""
    parts: list[RenderableType] = [Text(_title(plan), style="bold"), _precisions(plan)]
    if plan.trainings:
        parts.append(_trainings(plan))
    parts += [Text(f"note: {note}", style="yellow") for note in plan.notes]
    parts.append(Text(_caption(plan), style="dim"))
    parts += [Text(line, style="bold green") for line in _next(plan)]
    return Group(*parts)


def _title(plan: Plan) -> str:
    texts = "" if plan.batch == 1 else f" in each of {plan.batch} texts"
    return f"{plan.model}: {plan.architecture}, {_count(plan.parameters)} parameters; {plan.context:,} tokens{texts}"


def _precisions(plan: Plan) -> Table:
    unit, divisor = _unit([row.total for row in plan.rows])
    table = _table()
    table.add_column("precision", no_wrap=True)
    for heading in ("bits\n", f"weights\n{unit}", "cache\n", "int8\ncache", "act.\n", f"total\n{unit}"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("fits", no_wrap=True)
    for heading in ("most\ntokens", "est.\ntok/s"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("loss", no_wrap=True)
    for row in plan.rows:
        parts = (row.weights, row.cache, row.cache_int8, row.activations, row.total)
        table.add_row(
            row.precision,
            f"{row.bits_per_weight:.2f}",
            *(_amount(nbytes, divisor) for nbytes in parts),
            _fits(plan, row.fits, row.fits_int8),
            "any" if row.longest_context is None else f"{row.longest_context:,}" if row.longest_context else "-",
            "-" if row.tokens_per_second is None else f"{row.tokens_per_second:,.3g}",
            row.accuracy,
            style="bold" if row == plan.best else None if row.fits else "dim",
        )
    return table


def _fits(plan: Plan, fits: Sequence[str], fits_int8: Sequence[str] = ()) -> str:
    if not fits:
        return "int8 cache" if fits_int8 else "no"
    return "yes" if len(plan.memories) == 1 else ", ".join(dict.fromkeys(fits))


def _trainings(plan: Plan) -> Table:
    unit, divisor = _unit([row.total for row in plan.trainings])
    table = _table()
    table.add_column("training, AdamW", overflow="fold")
    headings = ("bytes/\nparam.", f"weights\n{unit}", "copy\n", "gradi-\nents", "state\n", "activ.\n", f"total\n{unit}")
    for heading in headings:
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("fits", no_wrap=True)
    for row in plan.trainings:
        parts = (row.weights, row.low_precision_copy, row.gradients, row.state, row.activations, row.total)
        cells = (_amount(nbytes, divisor) for nbytes in parts)
        style = "bold" if row == plan.best_training else None if row.fits else "dim"
        table.add_row(row.name, f"{row.bytes_per_parameter:.2f}", *cells, _fits(plan, row.fits), style=style)
    return table


def _unit(totals: Sequence[int]) -> tuple[str, int]:
    return ("GiB", 2**30) if max(totals, default=0) >= 10 * 2**30 else ("MiB", 2**20)


def _amount(nbytes: int, divisor: int) -> str:
    value = nbytes / divisor
    return "-" if not nbytes else f"{value:,.2f}" if value < 99.95 and divisor == 2**30 else f"{value:,.0f}"


def _caption(plan: Plan) -> str:
    memories = ", ".join(_memory(plan, memory.name, memory.nbytes) for memory in plan.memories)
    limit = "" if plan.context_limit is None else f" The model sees {plan.context_limit:,} tokens at most."
    return (
        f"Memory: {memories}.{limit}\n"
        "Most tokens: the longest context that fits. Weights and cache (keys and values) are counted; activations (of "
        "the whole context read at once) and tokens/s are estimates. Python and its libraries take some 0.4 GiB more.\n"
        f"Loss of accuracy: KL to fp32 up to {NEGLIGIBLE} nats/token is called negligible, up to {SLIGHT} slight, "
        f"beyond visible; as measured on {SOURCE}. Larger models lose less."
    )


def _memory(plan: Plan, name: str, nbytes: int) -> str:
    bandwidth = plan.bandwidth.get(name)
    read = "" if bandwidth is None else f", read at {bandwidth / 1e9:.0f} GB/s"
    if name == "given":
        return f"{human_bytes(nbytes)} as given" + (read and f"{read} as this machine's RAM")
    return f"{human_bytes(nbytes)} of {name}{read}"


def _next(plan: Plan) -> list[str]:
    best, training = plan.best, plan.best_training
    lines = [] if best is None else [f"next: {best.command}"]
    return lines if training is None else [*lines, f"to train: {training.command}"]


def _count(parameters: int) -> str:
    unit, divisor = ("billion", 1e9) if parameters >= 1e9 else ("million", 1e6)
    return f"{parameters / divisor:.3g} {unit}"


def _table() -> Table:
    return Table(box=SIMPLE_HEAD, show_edge=False, padding=(0, 0), header_style="bold")
