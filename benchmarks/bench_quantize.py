"""Converting a model to 8 bits on disk beside llama.cpp's own tool: seconds, and the peak of resident memory.

    PYTHONPATH=build/llama python benchmarks/bench_quantize.py BF16_FOLDER [--json FILE]

fewbits converts the folder to int8 in the compressed-tensors layout, and to Q8_0 in GGUF; llama.cpp quantizes a BF16
GGUF file, made from the same folder first, to Q8_0. Each run is a process of its own; imports are left out of the
seconds and are in the memory. fewbits flushes what it wrote to the disk before it ends; llama.cpp does not. The ways
take turns; the best time and the worst memory of each count.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path

RUNS = 3
WAYS = ("fewbits int8", "fewbits Q8_0", "llama.cpp Q8_0")


def main() -> None:
    """Parse, run, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="folder of the model in bf16, with a tokenizer")
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--where", default="build", help="folder to write to; /dev/shm leaves the disk out")
    parser.add_argument("--runs", type=int, default=RUNS)
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.way:
        print(json.dumps(run_once(options.way, options.model, options.where)))
        return
    runs: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
    for _ in range(options.runs):
        for way in WAYS:
            command = [
                sys.executable,
                "-W",
                "ignore",
                __file__,
                str(options.model),
                "--where",
                options.where,
                "--way",
                way,
            ]
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
            runs[way].append(json.loads(done.stdout.splitlines()[-1]))
    figures = {
        way: {"seconds": min(run["seconds"] for run in each), "peak_bytes": max(run["peak_bytes"] for run in each)}
        for way, each in runs.items()
    }
    theirs = figures["llama.cpp Q8_0"]
    for way, figure in figures.items():
        ratio = theirs["seconds"] / figure["seconds"]
        peak = figure["peak_bytes"] / 1e9
        print(f"{way:16} {figure['seconds']:6.2f} s   peak {peak:5.2f} GB   {ratio:.2f} x llama.cpp's speed")
    if options.json:
        from fewbits.measure.machine import this_machine

        date = datetime.now(UTC).isoformat(timespec="seconds")
        report = {"date": date, "model": options.model.name, "figures": figures, "runs": runs}
        options.json.write_text(json.dumps(report | {"machine": this_machine().to_json()}, indent=1) + "\n")


def run_once(way: str, model: Path, where: str) -> dict[str, float]:
    """One conversion: seconds and peak bytes."""
    import torch

    import fewbits
    from fewbits.measure.memory import peak_resident_bytes
    from fewbits.models.architecture import empty_model
    from fewbits.models.source import open_source

    source = Path("build/speed") / f"{model.name}-bf16.gguf"
    if way.startswith("llama") and not source.exists():
        source.parent.mkdir(parents=True, exist_ok=True)
        command = [
            Path(sys.executable).with_name("fewbits"),
            "convert",
            str(model),
            str(source),
            "--to",
            "bf16",
            "--layout",
            "gguf",
        ]
        subprocess.run(command, check=True)
    with tempfile.TemporaryDirectory(dir=where) as folder:
        if way.startswith("llama"):
            import llama_cpp

            parameters = llama_cpp.llama_model_quantize_default_params()
            parameters.ftype = llama_cpp.LLAMA_FTYPE_MOSTLY_Q8_0
            started = time.perf_counter()
            code = llama_cpp.llama_model_quantize(
                str(source).encode(), str(Path(folder) / "out.gguf").encode(), parameters
            )
            assert code == 0, code
        else:
            empty_model(open_source(model).config, torch.bfloat16)  # imports the model's code
            started = time.perf_counter()
            if way == "fewbits int8":
                fewbits.convert(model, Path(folder) / "out", "int8")
            else:
                fewbits.convert(model, Path(folder) / "out.gguf", "q8_0", layout="gguf")
        return {"seconds": time.perf_counter() - started, "peak_bytes": peak_resident_bytes()}


if __name__ == "__main__":
    main()
