"""Casts beside torch, ml_dtypes, gfloat and a plain copy, in one run: bytes moved a second, and times faster.

    python benchmarks/bench_cast.py [--mib 512] [--threads 2] [--rounds 5] [--only e4m3fn] [--json FILE]

The input is that many MiB of normally distributed float32; outputs are made before, but where a row says "new". A
cast's bytes moved are those that it must read and write, its GB/s those over its time, and "of copy" is that over the
GB/s of copying the same float32, timed beside it.

Each round times every row, and in a row every contender once, one after the other; the best round of each counts. A
noisy machine then disturbs all of them alike. A contender that would take longer than a few seconds for all of the
input is timed on its first 2^20 elements, which its caches hold, and extrapolated: its figures carry a ~.

ml_dtypes and gfloat run on one thread and store one code to a byte, packed rows included.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

import fewbits
from fewbits.formats import Format
from fewbits.measure.machine import this_machine
from fewbits.tensors.block import BlockCodes

FORMATS = ("fp16", "bf16", "e4m3fn", "e5m2", "e3m2fn", "e2m1fn")
BLOCKS = ("mxfp4", "nvfp4")
ROW = 4096  # last dimension of what is quantized in blocks
SLICE = 1 << 20  # elements
SLOW_SECONDS = 3
OURS, COPY = "fewbits", "copy"

Work = Callable[[int], object]  # cast the first so many elements


@dataclass
class Timing:
    """One contender in one row: its best seconds for the whole input, and whether they are extrapolated."""

    seconds: float
    extrapolated: bool


@dataclass
class Row:
    """One cast.

    Attributes:
        name: as the table shows it.
        bytes_per_element: bytes that it reads and writes for each element.
        contenders: what to time, by name.
        prepare: run before the row is timed, in every round: fills the codes that a decoder reads.
        timings: what was timed, by name.
    """

    name: str
    bytes_per_element: float
    contenders: dict[str, Work]
    prepare: Callable[[], object] = lambda: None
    timings: dict[str, Timing] = field(default_factory=dict)


class Buffers:
    """The input and one output of each width, all of them written once, so that no page is fresh."""

    def __init__(self, elements: int) -> None:
        generator = torch.Generator().manual_seed(0)
        self.x = torch.empty(elements).normal_(generator=generator)
        self.y = torch.zeros(elements)
        self.bytes = torch.zeros(2 * elements, dtype=torch.uint8)

    def codes(self, name: str, count: int) -> torch.Tensor:
        """Room for as many codes of a format."""
        return self.bytes[:count] if Format.named(name).bits <= 8 else self.bytes[: 2 * count].view(torch.uint16)


def rows(buffers: Buffers) -> Iterator[Row]:
    """Every cast, with its contenders."""
    for name in FORMATS:
        yield encode_row(buffers, name)
    for name in FORMATS:
        yield decode_row(buffers, name)
    yield decode_new_row(buffers, "e4m3fn")
    for name in ("bf16", "e4m3fn"):
        yield stochastic_row(buffers, name)
    for name in BLOCKS:
        yield block_row(buffers, name)


def encode_row(buffers: Buffers, name: str) -> Row:
    """float32 to codes."""
    x, packed = buffers.x, Format.named(name).bits <= 4

    def ours(n: int) -> object:
        out = buffers.bytes[: n // 2] if packed else buffers.codes(name, n)
        return fewbits.encode(x[:n], name, out=out, packed=packed)

    contenders: dict[str, Work] = {OURS: ours}
    if (dtype := torch_dtype(name)) is not None:
        contenders["torch"] = lambda n: buffers.codes(name, n).view(dtype).copy_(x[:n])
    if (their := ml_dtype(name)) is not None:
        contenders["ml_dtypes"] = lambda n: np.copyto(
            buffers.codes(name, n).numpy().view(their), x[:n].numpy(), casting="unsafe"
        )
    if (gfloat := gfloat_of(name)) is not None:
        contenders["gfloat"] = lambda n: gfloat.encode(x[:n].numpy())
    return Row(f"fp32 → {name}{', packed' if packed else ''}", 4 + bytes_of(name, packed), contenders)


def decode_row(buffers: Buffers, name: str) -> Row:
    """Codes to float32."""
    y, packed = buffers.y, Format.named(name).bits <= 4
    elements = buffers.x.numel()

    def prepare() -> object:
        return fewbits.encode(buffers.x, name, out=buffers.codes(name, elements))

    contenders: dict[str, Work] = {}
    if packed:  # the same bytes read as pairs of codes: all of them are in range
        contenders[OURS] = lambda n: fewbits.decode(buffers.bytes[: n // 2], name, packed=True, out=y[:n])
    else:
        contenders[OURS] = lambda n: fewbits.decode(buffers.codes(name, n), name, out=y[:n])
    if (dtype := torch_dtype(name)) is not None:
        contenders["torch"] = lambda n: y[:n].copy_(buffers.codes(name, n).view(dtype))
    if (their := ml_dtype(name)) is not None:
        contenders["ml_dtypes"] = lambda n: np.copyto(
            y[:n].numpy(), buffers.codes(name, n).numpy().view(their), casting="unsafe"
        )
    if (gfloat := gfloat_of(name)) is not None:
        contenders["gfloat"] = lambda n: gfloat.decode(buffers.codes(name, n).numpy())
    return Row(f"{name} → fp32{', packed' if packed else ''}", 4 + bytes_of(name, packed), contenders, prepare)


def decode_new_row(buffers: Buffers, name: str) -> Row:
    """Codes to float32 in a tensor that is made on the way."""
    elements = buffers.x.numel()
    contenders: dict[str, Work] = {
        OURS: lambda n: fewbits.decode(buffers.codes(name, n), name),
        "torch": lambda n: buffers.codes(name, n).view(torch_dtype(name)).to(torch.float32),
    }
    prepare = lambda: fewbits.encode(buffers.x, name, out=buffers.codes(name, elements))  # noqa: E731
    return Row(f"{name} → fp32, new", 4 + bytes_of(name), contenders, prepare)


def stochastic_row(buffers: Buffers, name: str) -> Row:
    """float32 to codes, rounded at random."""
    contenders: dict[str, Work] = {
        OURS: lambda n: fewbits.encode(buffers.x[:n], name, "stochastic", seed=0, out=buffers.codes(name, n))
    }
    return Row(f"fp32 → {name}, stochastic", 4 + bytes_of(name), contenders)


def block_row(buffers: Buffers, name: str) -> Row:
    """float32 to a block format: codes, one to a byte, and scales."""
    fmt = Format.named(name)
    assert fmt.block is not None
    elements = buffers.x.numel()
    count = elements // fmt.block.size
    codes, scales = buffers.bytes[:elements], buffers.bytes[elements : elements + count]

    def ours(n: int) -> object:
        made = BlockCodes(codes[:n].view(-1, ROW), scales[: n // fmt.block.size].view(-1, ROW // fmt.block.size))
        return fewbits.encode(buffers.x[:n].view(-1, ROW), name, out=made)

    contenders: dict[str, Work] = {OURS: ours}
    return Row(f"fp32 → {name}", 4 + 1 + 1 / fmt.block.size, contenders)


def bytes_of(name: str, packed: bool = False) -> float:
    """Bytes of one code."""
    return 0.5 if packed else -(-Format.named(name).bits // 8)


def torch_dtype(name: str) -> torch.dtype | None:
    """The dtype that torch casts to, if there is one."""
    return {
        "fp16": torch.float16,
        "bf16": torch.bfloat16,
        "e4m3fn": torch.float8_e4m3fn,
        "e5m2": torch.float8_e5m2,
    }.get(name)


def ml_dtype(name: str) -> Any:
    """The scalar type of ml_dtypes, if it is installed and has one; fp16 is numpy's own."""
    try:
        import ml_dtypes
    except ImportError:
        return None
    names = {"bf16": "bfloat16", "e4m3fn": "float8_e4m3fn", "e5m2": "float8_e5m2", "e3m2fn": "float6_e3m2fn"}
    return getattr(ml_dtypes, {**names, "e2m1fn": "float4_e2m1fn"}.get(name, ""), None)


class Gfloat:
    """gfloat's casts of arrays."""

    def __init__(self, info: Any) -> None:
        self.info = info

    def encode(self, x: np.ndarray) -> np.ndarray:
        """Round, then encode."""
        import gfloat

        return gfloat.encode_ndarray(self.info, gfloat.round_ndarray(self.info, x, sat=self.info.num_infs == 0))

    def decode(self, codes: np.ndarray) -> np.ndarray:
        """Codes to float64."""
        import gfloat

        return gfloat.decode_ndarray(self.info, codes)


def gfloat_of(name: str) -> Gfloat | None:
    """Gfloat's casts for a format, if it is installed."""
    try:
        from gfloat import formats
    except ImportError:
        return None
    names = {"fp16": "binary16", "bf16": "bfloat16", "e4m3fn": "ocp_e4m3", "e5m2": "ocp_e5m2", "e3m2fn": "ocp_e3m2"}
    return Gfloat(getattr(formats, f"format_info_{ {**names, 'e2m1fn': 'ocp_e2m1'}[name] }"))


def measure(all_rows: list[Row], elements: int, rounds: int, console: Console) -> None:
    """Time every row in rounds and keep the best of each contender."""
    for done in range(rounds):
        for row in all_rows:
            row.prepare()
            for name, work in row.contenders.items():
                best = row.timings.get(name)
                timing = timed(work, elements, best)
                if best is None or timing.seconds < best.seconds:
                    row.timings[name] = timing
        console.print(f"round {done + 1} of {rounds} timed", style="dim")


def timed(work: Work, elements: int, known: Timing | None) -> Timing:
    """Seconds for all elements, extrapolated from a slice if that would be long."""
    part = min(SLICE, elements)
    if known is None:
        work(part)  # warm up: tables, imports, threads
        slow = seconds_of(work, part) * elements / part > SLOW_SECONDS
    else:
        slow = known.extrapolated
    if slow and part < elements:
        return Timing(seconds_of(work, part) * elements / part, True)
    return Timing(seconds_of(work, elements), False)


def seconds_of(work: Work, elements: int) -> float:
    """One run."""
    started = time.perf_counter()
    work(elements)
    return time.perf_counter() - started


def gigabytes_per_second(row: Row, name: str, elements: int) -> float:
    """Bytes moved over time."""
    moved = (8 if name == COPY else row.bytes_per_element) * elements
    return moved / row.timings[name].seconds / 1e9


def figures(row: Row, elements: int) -> dict[str, Any]:
    """A row as plain data."""
    speed = gigabytes_per_second(row, OURS, elements)
    copy = gigabytes_per_second(row, COPY, elements)
    return {
        "cast": row.name,
        "bytes_per_element": row.bytes_per_element,
        "gigabytes_per_second": speed,
        "copy_gigabytes_per_second": copy,
        "of_copy": speed / copy,
        "timings": {name: asdict(timing) for name, timing in row.timings.items()},
    }


def table(all_rows: list[Row], elements: int, mib: int) -> Table:
    """Ours in GB/s and of copy; how many times longer each peer takes."""
    shown = Table(title=f"{mib} MiB of float32")
    peers = ("torch", "ml_dtypes", "gfloat")
    for heading in ("cast", "fewbits GB/s", "of copy", *(f"× {peer}" for peer in peers)):
        shown.add_column(heading, justify="left" if heading == "cast" else "right")
    for row in all_rows:
        found, ours = figures(row, elements), row.timings[OURS]
        mark = "~" if ours.extrapolated else ""
        cells = [f"{mark}{found['gigabytes_per_second']:.2f}", f"{mark}{found['of_copy']:.2f}"]
        for peer in peers:
            timing = row.timings.get(peer)
            about = "~" if timing and (timing.extrapolated or ours.extrapolated) else ""
            cells.append(f"{about}{timing.seconds / ours.seconds:.3g}" if timing else "-")
        shown.add_row(row.name, *cells)
    return shown


def peer_versions() -> dict[str, str]:
    """Versions of the peers that are installed; torch's is in the machine's versions."""
    found = {}
    for name in ("ml_dtypes", "gfloat"):
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mib", type=int, default=512, help="MiB of float32 to cast; 4 or more")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5, help="rounds of timing; the best counts")
    parser.add_argument("--only", default="", help="rows whose name contains this")
    parser.add_argument("--json", type=Path, help="write the figures here")
    options = parser.parse_args()
    if options.mib < 4:
        parser.error(f"--mib {options.mib}: give 4 or more")
    torch.set_num_threads(options.threads)
    elements = options.mib << 18
    buffers = Buffers(elements)
    chosen = [row for row in rows(buffers) if options.only in row.name]
    if not chosen:
        parser.error(f"--only {options.only}: no row has that in its name")
    for row in chosen:
        row.contenders[COPY] = lambda n: buffers.y[:n].copy_(buffers.x[:n])
    console = Console(width=120)
    measure(chosen, elements, options.rounds, console)
    report = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "mib": options.mib,
        "rounds": options.rounds,
        "rows": [figures(row, elements) for row in chosen],
        "peers": peer_versions(),
        "machine": this_machine().to_json(),
    }
    show(report, table(chosen, elements, options.mib), console)
    if options.json:
        options.json.write_text(json.dumps(report, indent=1) + "\n")


def show(report: dict[str, Any], shown: Table, console: Console) -> None:
    """Print the table, the copy beside it, and what it was measured on."""
    console.print(shown)
    copies = [row["copy_gigabytes_per_second"] for row in report["rows"]]
    console.print(
        f"copy: {min(copies):.2f} to {max(copies):.2f} GB/s; best of {report['rounds']} rounds; {report['date']}"
    )
    console.print("~ extrapolated from 2^20 elements; × is times faster than that peer")
    machine = report["machine"]
    console.print(
        f"{machine['cpu']}, {machine['threads']} threads, {machine['isa']}; {machine['versions'] | report['peers']}"
    )


if __name__ == "__main__":
    main()
