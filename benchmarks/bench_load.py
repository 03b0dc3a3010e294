"""What loading a model in 8 bits takes, beside bitsandbytes: seconds, and the peak of resident memory.

    PYTHONPATH=build/peers python benchmarks/bench_load.py MODEL [--json FILE]

Each run is a fresh process that first imports everything (torch, transformers, the library and the model's code), then
loads. The seconds are those of the load alone, the best of the runs; the memory is the highest resident size of the
process, imports included, the worst of the runs. The libraries take turns, so that all meet the same file cache.
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

RUNS = 3
LIBRARIES = ("fewbits", "bitsandbytes")


def main() -> None:
    """Parse, run the loads, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a folder or a Hub id with weights in 16 or 32 bits")
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--runs", type=int, default=RUNS)
    parser.add_argument("--only", choices=LIBRARIES, help="leave the others out")
    parser.add_argument("--one-run-of", choices=LIBRARIES, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one_run_of:
        print(json.dumps(load_once(options.one_run_of, options.model)))
        return
    libraries = [options.only] if options.only else LIBRARIES
    runs: dict[str, list[dict[str, float]]] = {library: [] for library in libraries}
    for _ in range(options.runs):
        for library in libraries:
            runs[library].append(run_apart(library, options.model))
    figures = {library: summary(done) for library, done in runs.items()}
    for library, figure in figures.items():
        print(
            f"{library}: {figure['seconds']:.2f} s (best of {options.runs}), peak {figure['peak_bytes'] / 1e9:.2f} GB"
        )
    if len(figures) > 1:
        ours, theirs = figures["fewbits"], figures["bitsandbytes"]
        print(
            f"fewbits is {theirs['seconds'] / ours['seconds']:.2f} x as fast, "
            f"with {ours['peak_bytes'] / theirs['peak_bytes']:.2f} of the peak"
        )
    if options.json:
        from fewbits.measure.machine import this_machine  # after the runs: importing torch here would take memory

        date = datetime.now(UTC).isoformat(timespec="seconds")
        report = {"date": date, "model": options.model, "figures": figures, "runs": runs}
        options.json.write_text(json.dumps(report | {"machine": this_machine().to_json()}, indent=1) + "\n")


def summary(runs: list[dict[str, float]]) -> dict[str, float]:
    """The best time and the worst memory."""
    return {"seconds": min(run["seconds"] for run in runs), "peak_bytes": max(run["peak_bytes"] for run in runs)}


def run_apart(library: str, model: str) -> dict[str, float]:
    """One load in a process of its own."""
    command = [sys.executable, "-W", "ignore", __file__, model, "--one-run-of", library]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def load_once(library: str, model: str) -> dict[str, float]:
    """Import, load, and tell how long it took and how much memory it needed."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from fewbits.measure.memory import peak_resident_bytes

    load: Any
    if library == "fewbits":
        import fewbits
        from fewbits.models.architecture import empty_model
        from fewbits.models.source import open_source

        empty_model(open_source(model).config, torch.bfloat16)  # imports the model's code
        load = fewbits.AutoModelForCausalLM.from_pretrained

        def run() -> Any:
            return load(model, load_in_8bit=True)
    else:
        import bitsandbytes  # noqa: F401
        from transformers import BitsAndBytesConfig

        with torch.device("meta"):
            AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(model))

        def run() -> Any:
            config = BitsAndBytesConfig(load_in_8bit=True)
            return AutoModelForCausalLM.from_pretrained(model, quantization_config=config, device_map="cpu")

    started = time.perf_counter()
    loaded = run()
    seconds = time.perf_counter() - started
    del loaded
    return {"seconds": seconds, "peak_bytes": peak_resident_bytes()}


if __name__ == "__main__":
    main()
