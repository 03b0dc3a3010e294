"""What rotating activations costs in time: the same model in int8 and int4 with and without it, in turn.

    python benchmarks/bench_rotation.py BF16_FOLDER [--rounds 5] [--json FILE]

Ratios are of medians over rounds; in every round each model reads a prompt of 512 tokens and writes 64 more.
"""

from __future__ import annotations

import argparse
import json
import statistics
from datetime import UTC, datetime
from pathlib import Path

import torch

from fewbits.measure.machine import this_machine
from fewbits.measure.speed import measure_speed
from fewbits.measure.text import token_windows
from fewbits.models.load import AutoModelForCausalLM, AutoTokenizer

NEW_TOKENS = 64


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="folder of the model in bf16")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, help="write the figures here")
    options = parser.parse_args()
    prompt = token_windows(AutoTokenizer.from_pretrained(options.model), windows=1)[0]
    results = {name: of_precision(options.model, name, prompt, options.rounds) for name in ("int8", "int4")}
    if options.json:
        report = {
            "date": datetime.now(UTC).isoformat(timespec="seconds"), "model": options.model.name,
            "results": results, "machine": this_machine().to_json(),
        }  # fmt: skip
        options.json.write_text(json.dumps(report, indent=1) + "\n")


def of_precision(folder: Path, precision: str, prompt: torch.Tensor, rounds: int) -> dict[str, float]:
    """Tokens per second with and without rotation, and their ratios."""
    models = {
        rotate: AutoModelForCausalLM.from_pretrained(folder, precision=precision, rotate=rotate)
        for rotate in (True, False)
    }
    taken: dict[bool, list] = {True: [], False: []}
    for _ in range(rounds):
        for rotate, model in models.items():
            taken[rotate].append(measure_speed(model, prompt, NEW_TOKENS, repeats=1))
    found = {}
    for what in ("prefill", "decode"):
        rotated, plain = (statistics.median(getattr(one, what) for one in taken[rotate]) for rotate in (True, False))
        found |= {f"{what}_rotated": rotated, f"{what}_plain": plain, f"{what}_ratio": rotated / plain}
        print(
            f"{precision} {what:8} rotated {rotated:8.1f} tok/s  plain {plain:8.1f} tok/s  ratio {rotated / plain:.3f}"
        )
    return found


if __name__ == "__main__":
    main()
