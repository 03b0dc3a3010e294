"""Prefill and decode of 8- and 4-bit models beside the fastest peers on a CPU, and the machine's limits, in one run.

    PYTHONPATH=build/peers:build/llama python benchmarks/bench_generate.py BF16_FOLDER [--json FILE] [--only NAME …]

The folder holds a Llama model in bf16 with a tokenizer. What a library runs is made from it first, under build/speed:
fewbits' int8 and int4, GGUF files for llama.cpp, a CTranslate2 model. Each library then lives in a process of its own,
which loads its model and waits. In every round each of them reads 512 tokens and writes 32 after it, one after the
other while the others sleep; the best round of each counts. `--apart` loads one model at a time instead, for models
of which memory does not hold them all. A peer that is not installed is left out, and told. What the libraries say on
the way goes to build/speed.log.

`--batch 8` and `--context 4096` then run fewbits on so many texts at once, and after so many tokens, in turns with the
plain run that they are held against. Ratios are printed beside what we want of them.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import generate_report
import libraries
import limits

NAMES = tuple(libraries.LOADERS)
LIMITS = "limits"


def main() -> None:
    """Parse, measure in rounds, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="folder of the model in bf16, with a tokenizer")
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--prompt", type=int, default=512, help="tokens of the prompt")
    parser.add_argument("--new", type=int, default=32, help="tokens written after it")
    parser.add_argument("--only", nargs="+", choices=NAMES, default=[name for name in NAMES if "," not in name])
    parser.add_argument("--batch", type=int, default=1, help="also decode so many texts at once, with fewbits")
    parser.add_argument("--context", type=int, default=0, help="also decode after so many tokens, with fewbits")
    parser.add_argument("--apart", action="store_true", help="one model in memory at a time")
    parser.add_argument("--worker", choices=(*NAMES, LIMITS), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        serve(options.worker, options.model)
        return
    report = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"), "model": options.model.name, "prompt": options.prompt,
        "new": options.new, "batch": options.batch, "context": options.context, "rounds": options.rounds,
        "threads": libraries.THREADS, "weights": limits.weights_of_a_token(options.model), **measure(options),
    }  # fmt: skip
    report["ratios"] = generate_report.ratios(report)
    generate_report.show(report)
    if options.json:
        from fewbits.measure.machine import this_machine

        options.json.write_text(json.dumps(report | {"machine": this_machine().to_json()}, indent=1) + "\n")


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """All rounds, the best figures of each library, the limits, and which libraries were left out."""
    rounds: list[dict[str, dict[str, float]]] = []
    skipped: dict[str, str] = {}
    groups = [[name] for name in options.only] if options.apart else [options.only]
    for group in groups:
        workers = {}
        for name in (LIMITS, *group):
            worker, answer = start(name, options.model)
            if "skipped" in answer:
                skipped[name] = answer["skipped"]
            else:
                workers[name] = worker
        rounds += [ask_all(workers, options) for ask_all in (plain_round, further_round) for _ in range(options.rounds)]
        for worker in workers.values():
            stop(worker)
    figures = best(rounds)
    return {"limits": figures.pop(LIMITS, {}), "figures": figures, "skipped": skipped, "rounds_done": rounds}


def plain_round(workers: dict[str, subprocess.Popen[str]], options: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Everybody once."""
    return {name: ask(worker, options.prompt, options.new, 1) for name, worker in workers.items()}


def further_round(
    workers: dict[str, subprocess.Popen[str]], options: argparse.Namespace
) -> dict[str, dict[str, float]]:
    """Of fewbits: the plain run, several texts at once, a long context. Memory is that of the plain runs."""
    found = {}
    for name, worker in workers.items():
        if not name.startswith("fewbits int8") or (options.batch == 1 and not options.context):
            continue
        plain = ask(worker, options.prompt, options.new, 1)
        found[name] = {"prefill": plain["prefill"], "decode": plain["decode"]}
        if options.batch > 1:
            found[name]["batch_decode"] = ask(worker, options.prompt, options.new, options.batch)["decode"]
        if options.context:
            found[name]["context_decode"] = ask(worker, options.context, options.new, 1)["decode"]
    return found


def start(name: str, model: Path) -> tuple[subprocess.Popen[str], dict[str, Any]]:
    """A process that holds one model; its first line says that it is ready, or why not."""
    command = [sys.executable, "-W", "ignore", __file__, str(model), "--worker", name]
    with Path("build/speed.log").open("a") as log:
        worker = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True)
    return worker, answer_of(worker)


def ask(worker: subprocess.Popen[str], prompt: int, new: int, batch: int) -> dict[str, float]:
    """One run of one model."""
    assert worker.stdin
    worker.stdin.write(json.dumps({"prompt": prompt, "new": new, "batch": batch}) + "\n")
    worker.stdin.flush()
    time.sleep(0.2)  # threads of the one before, which may still spin, are asleep by then
    return answer_of(worker)


def answer_of(worker: subprocess.Popen[str]) -> dict[str, Any]:
    """The next line of JSON; libraries print other things too."""
    assert worker.stdout
    for line in worker.stdout:
        if line.startswith("{"):
            return dict(json.loads(line))
    return {"skipped": f"its process ended with code {worker.wait()}"}


def stop(worker: subprocess.Popen[str]) -> None:
    """Let a process end."""
    assert worker.stdin
    worker.stdin.close()
    worker.wait()


def best(rounds: list[dict[str, dict[str, float]]]) -> dict[str, dict[str, float]]:
    """The best of each figure, and the worst of the memory: the greatest of both."""
    figures: dict[str, dict[str, float]] = {}
    for round_ in rounds:
        for name, one in round_.items():
            known = figures.setdefault(name, {})
            for key, value in one.items():
                known[key] = max(known.get(key, 0.0), value)
    return figures


def serve(name: str, model: Path) -> None:
    """Load one model, then time what is asked for, line by line."""
    if name == LIMITS:
        print(json.dumps({"ready": name}), flush=True)
        for _ in sys.stdin:
            print(json.dumps(limits.probe(libraries.THREADS)), flush=True)
        return
    try:
        step = libraries.LOADERS[name](model)
        step(list(range(3, 35)), 2, 1)  # warm up
    except ImportError as error:
        print(json.dumps({"skipped": str(error)}), flush=True)
        return
    print(json.dumps({"ready": name}), flush=True)
    from fewbits.measure.memory import peak_resident_bytes

    for line in sys.stdin:
        asked = json.loads(line)
        prompt = [3 + 7 * index % 4000 for index in range(asked["prompt"])]
        read, written = step(prompt, asked["new"], asked["batch"])
        speeds = {
            "prefill": asked["prompt"] * asked["batch"] / read,
            "decode": asked["new"] * asked["batch"] / written,
        }
        print(json.dumps(speeds | {"peak_bytes": peak_resident_bytes()}), flush=True)


if __name__ == "__main__":
    main()
