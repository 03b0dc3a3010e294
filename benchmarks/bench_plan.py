"""What `fewbits plan` says of weights, cache and peak, beside what a process holds: RSS over that of a tiny model.

    .venv/bin/python benchmarks/bench_plan.py build/smollm2-bf16 build/smollm2-int8 build/llama-1.2b --json FILE

Each row is a process of its own. It first loads and runs a model of the same kind with two small layers, so that
every library is in memory; then the model, and a text of the context in pieces of 512 tokens. Measured is the RSS
beyond that, with what the allocator keeps of freed activations given back.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

PRECISIONS = ("bf16", "int8", "int4")
CONTEXT, PIECE = 2048, 512


def main() -> None:
    """Measure every model in every precision, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="*")
    parser.add_argument("--context", type=int, default=CONTEXT)
    parser.add_argument("--precisions", nargs="+", default=PRECISIONS)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--one", nargs=3, metavar=("MODEL", "PRECISION", "CONTEXT"), help="Used by the script itself.")
    arguments = parser.parse_args()
    if arguments.one:
        model, precision, context = arguments.one
        print(json.dumps(measure(model, precision, int(context))))
        return
    rows = []
    print(f"| {arguments.context} tokens | plan, MiB | measured | ratio | planned tok/s | measured |")
    print("|---|---|---|---|---|---|")
    for model in arguments.models:
        for precision in precisions_of(model, arguments.precisions):
            row = in_a_process(model, precision, arguments.context)
            rows.append(row)
            plan, measured = row["plan_bytes"] / 2**20, row["measured_bytes"] / 2**20
            print(
                f"| {Path(model).name} {precision} | {plan:.1f} | {measured:.1f} | {measured / plan:.3f} | "
                f"{row['plan_tps']:.1f} | {row['tps']:.1f} |",
                flush=True,
            )
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=1) + "\n")


def precisions_of(model: str, wanted: list[str]) -> list[str]:
    """Those asked for; of a checkpoint that is quantized already, its own."""
    from fewbits.measure.plan_config import read_configuration
    from fewbits.measure.plan_model import Outline

    stored = Outline.of(read_configuration(model)).stored
    return [stored.name] if stored else list(wanted)


def in_a_process(model: str, precision: str, context: int) -> dict[str, Any]:
    """What a fresh process measures."""
    command = [sys.executable, __file__, "--one", model, precision, str(context)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ)
    if done.returncode:
        sys.exit(f"{model} {precision}: {done.stderr.strip().splitlines()[-1]}")
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def measure(model: str, precision: str, context: int) -> dict[str, Any]:
    """Plan, then load and run."""
    import time

    import torch

    import fewbits
    from fewbits.measure.memory import resident_bytes, weight_bytes

    torch.manual_seed(0)
    plan = fewbits.plan(model, context=context, memory="1TiB")
    row = next(row for row in plan.rows if row.precision == precision)
    with tempfile.TemporaryDirectory() as folder:
        write_small(model, Path(folder))
        small = fewbits.AutoModelForCausalLM.from_pretrained(folder, precision=precision)
        read(small, 2 * PIECE)
        del small
    give_back()
    before = resident_bytes()
    stored = len(plan.rows) == 1
    loaded = fewbits.AutoModelForCausalLM.from_pretrained(model, precision=None if stored else precision)
    give_back()
    of_weights = resident_bytes() - before
    cache = read(loaded, context)
    give_back()
    measured = resident_bytes() - before
    token, tokens, started = torch.tensor([[1]]), 16, time.perf_counter()
    with torch.inference_mode():
        for _ in range(tokens):
            cache = loaded(input_ids=token, past_key_values=cache, use_cache=True).past_key_values
    return {
        "model": model,
        "precision": precision,
        "context": context,
        "plan_bytes": row.weights + row.cache,
        "measured_bytes": measured,
        "plan_weights": row.weights,
        "weights": weight_bytes(loaded),
        "measured_weights": of_weights,
        "plan_activations": row.activations,
        "plan_tps": row.tokens_per_second,
        "tps": tokens / (time.perf_counter() - started),
        "bandwidth": plan.bandwidth["given"],
        "threads": torch.get_num_threads(),
    }


def write_small(model: str, folder: Path) -> None:
    """A model of the same kind, small."""
    import transformers

    from fewbits.measure.plan_config import read_configuration

    config = read_configuration(model).config
    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "vocab_size": 512}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64}
    config = type(config)(**sizes, **heads, dtype="bfloat16", tie_word_embeddings=config.tie_word_embeddings)
    transformers.AutoModelForCausalLM.from_config(config, dtype="bfloat16").save_pretrained(folder)


def read(model: Any, tokens: int) -> Any:
    """The cache after a text of so many tokens, read in pieces."""
    import torch

    ids, cache = torch.randint(3, 500, (1, tokens)), None
    with torch.inference_mode():
        for start in range(0, tokens, PIECE):
            piece = ids[:, start : start + PIECE]
            cache = model(input_ids=piece, past_key_values=cache, use_cache=True, logits_to_keep=1).past_key_values
    return cache


def give_back() -> None:
    """Freed memory to the system, so that RSS is what is held."""
    import ctypes
    import gc

    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)


if __name__ == "__main__":
    main()
