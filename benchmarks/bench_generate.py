"""int8 of fewbits beside its peers, in one run: load, memory, prefill, decode, and what the bits cost.

    python benchmarks/bench_generate.py BF16_FOLDER INT8_FOLDER [--json FILE]

The folders are `fewbits convert MODEL BF16_FOLDER --to bf16` and `fewbits convert MODEL INT8_FOLDER --to int8`. Every
peer starts from the bf16 folder; the reference is that folder computed in fp32. A peer that is not installed is
skipped with its reason.

Speed is timed in rounds: each round runs every model once, one after the other, and the best round of each model
counts. A noisy machine then disturbs all of them alike. All models are in memory together for that.
"""

from __future__ import annotations

import argparse
import json
import logging
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console
from rich.table import Table
from torch import nn

from fewbits.measure.machine import this_machine
from fewbits.measure.memory import weight_bytes
from fewbits.measure.quality import Reference
from fewbits.measure.speed import measure_speed
from fewbits.measure.text import text_name, token_windows
from fewbits.models.load import AutoModelForCausalLM, AutoTokenizer

OURS = "fewbits int8"


@dataclass(frozen=True)
class Result:
    """One model, measured."""

    name: str
    load_seconds: float
    memory_bytes: int
    kl: float
    kl_stderr: float
    top1: float
    perplexity: float
    prefill_tps: float = 0.0
    decode_tps: float = 0.0


def transformers_bf16(bf16: Path, int8: Path) -> nn.Module:
    """The checkpoint as most people run it."""
    return transformers.AutoModelForCausalLM.from_pretrained(bf16, dtype=torch.bfloat16)


def transformers_fp32(bf16: Path, int8: Path) -> nn.Module:
    """The reference."""
    return transformers.AutoModelForCausalLM.from_pretrained(bf16, dtype=torch.float32)


def bitsandbytes_int8(bf16: Path, int8: Path) -> nn.Module:
    """LLM.int8(): W8A8 and outlier columns in 16 bits."""
    import bitsandbytes  # noqa: F401 - transformers' own message for its absence is a long one

    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it logs a line for every layer and token
    config = transformers.BitsAndBytesConfig(load_in_8bit=True)
    return transformers.AutoModelForCausalLM.from_pretrained(
        bf16, dtype=torch.bfloat16, quantization_config=config, device_map="cpu"
    )


def torchao_int8(bf16: Path, int8: Path) -> nn.Module:
    """W8A8 with dynamic scales per token, not compiled; transformers leaves the head in 16 bits."""
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig

    config = transformers.TorchAoConfig(Int8DynamicActivationInt8WeightConfig())
    return transformers.AutoModelForCausalLM.from_pretrained(
        bf16, dtype=torch.bfloat16, quantization_config=config, device_map="cpu"
    )


def fewbits_int8(bf16: Path, int8: Path) -> nn.Module:
    """The converted folder."""
    return AutoModelForCausalLM.from_pretrained(int8)


MODELS: dict[str, Callable[[Path, Path], nn.Module]] = {
    "transformers fp32": transformers_fp32,  # first: the reference of the others
    "transformers bf16": transformers_bf16,
    "bitsandbytes int8": bitsandbytes_int8,
    "torchao W8A8": torchao_int8,
    OURS: fewbits_int8,
}


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bf16", type=Path, help="folder of the model in bf16")
    parser.add_argument("int8", type=Path, help="folder of the same model, converted to int8")
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--rounds", type=int, default=3, help="rounds of timing; the best counts")
    parser.add_argument("--windows", type=int, default=8, help="windows of 512 tokens that quality is measured on")
    options = parser.parse_args()
    windows = token_windows(AutoTokenizer.from_pretrained(options.bf16), windows=options.windows)
    results, skipped = measure(options.bf16, options.int8, windows, options.rounds)
    report = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "text": f"{text_name()}, {windows.shape[0]} windows of {windows.shape[1]} tokens",
        "rounds": options.rounds,
        "results": [asdict(result) for result in results],
        "skipped": skipped,
        "peers": peer_versions(),
        "machine": this_machine().to_json(),
    }
    show(report, results)
    if options.json:
        options.json.write_text(json.dumps(report, indent=1) + "\n")


def measure(bf16: Path, int8: Path, windows: torch.Tensor, rounds: int) -> tuple[list[Result], dict[str, str]]:
    """Load every model and hold it against the reference; then time all of them in rounds."""
    for load in (transformers_bf16, fewbits_int8):
        load(bf16, int8)  # so that no model is the one that waits for the disk, or for imports
    models: dict[str, nn.Module] = {}
    results: dict[str, Result] = {}
    skipped: dict[str, str] = {}
    reference: Reference | None = None
    for name, load in MODELS.items():
        started = time.perf_counter()
        try:
            model = load(bf16, int8).eval()
        except ImportError as error:
            skipped[name] = str(error)
            continue
        seconds = time.perf_counter() - started
        reference = reference or Reference(model, windows)
        quality = reference.quality if not models else reference.measure(model)
        figures = {key: value for key, value in asdict(quality).items() if key != "positions"}
        models[name], results[name] = model, Result(name, seconds, bytes_of(model), **figures)
        print(f"{name}: KL {quality.kl:.4f}, perplexity {quality.perplexity:.3f}", flush=True)
    for done in range(rounds):
        for name, model in models.items():
            speed, best = measure_speed(model, windows[0], repeats=1), results[name]
            results[name] = replace(
                best,
                prefill_tps=max(best.prefill_tps, speed.prefill),
                decode_tps=max(best.decode_tps, speed.decode),
            )
        print(f"round {done + 1} of {rounds} timed", flush=True)
    return list(results.values()), skipped


def peer_versions() -> dict[str, str]:
    """Versions of the peers that are installed; transformers' is in the machine's versions."""
    found = {}
    for name in ("bitsandbytes", "torchao"):
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def bytes_of(model: nn.Module) -> int:
    """Bytes of weights in memory, with the scales that bitsandbytes keeps outside of parameters and buffers."""
    outside = 0
    for module in model.modules():
        scales = getattr(getattr(module, "weight", None), "SCB", None)
        if scales is None:  # the first forward pass moves them
            scales = getattr(getattr(module, "state", None), "SCB", None)
        outside += 0 if scales is None else scales.nbytes
    return weight_bytes(model) + outside


def show(report: dict[str, Any], results: list[Result]) -> None:
    """Print the figures, and ours over each peer's."""
    console = Console(width=120)
    table = Table(title="Figures")
    headings = ("load s", "memory MiB", "prefill tok/s", "decode tok/s", "KL nats/token", "top-1 %", "perplexity")
    for heading in ("", *headings):
        table.add_column(heading, justify="right" if heading else "left")
    for one in results:
        kl = f"{one.kl:.4f} ±{one.kl_stderr:.1g}"
        table.add_row(
            one.name, f"{one.load_seconds:.1f}", f"{one.memory_bytes / 2**20:.1f}", f"{one.prefill_tps:.0f}",
            f"{one.decode_tps:.1f}", kl, f"{100 * one.top1:.1f}", f"{one.perplexity:.3f}",
        )  # fmt: skip
    console.print(table)
    ours = next((one for one in results if one.name == OURS), None)
    if ours is not None:
        console.print(ratios(ours, [one for one in results if one is not ours]))
    for name, reason in report["skipped"].items():
        console.print(f"{name} skipped: {reason}")
    machine = report["machine"]
    console.print(f"{report['text']}; best of {report['rounds']} rounds; {report['date']}")
    console.print(
        f"{machine['cpu']}, {machine['threads']} threads, {machine['isa']}; {machine['versions'] | report['peers']}"
    )


def ratios(ours: Result, peers: list[Result]) -> Table:
    """Ours over each peer's: above 1 is better for speed, below 1 for the rest."""
    table = Table(title=f"{OURS} / peer")
    for heading in ("peer", "load", "memory", "prefill", "decode", "KL"):
        table.add_column(heading, justify="left" if heading == "peer" else "right")
    for peer in peers:
        pairs = [
            (ours.load_seconds, peer.load_seconds),
            (ours.memory_bytes, peer.memory_bytes),
            (ours.prefill_tps, peer.prefill_tps),
            (ours.decode_tps, peer.decode_tps),
            (ours.kl, peer.kl),
        ]
        table.add_row(peer.name, *(f"{mine / theirs:.2f}" if theirs else "-" for mine, theirs in pairs))
    return table


if __name__ == "__main__":
    main()
