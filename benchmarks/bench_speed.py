"""Prefill and decode of 8- and 4-bit models beside the fastest peers on a CPU, in one run.

    PYTHONPATH=build/peers:build/llama python benchmarks/bench_speed.py BF16_FOLDER [--json FILE] [--only NAME …]

The folder holds a Llama model in bf16 with a tokenizer. What a library runs is made from it first, under build/speed:
fewbits' int8 and int4, GGUF files for llama.cpp, a CTranslate2 model. Each library then lives in a process of its own,
which loads its model and waits. In every round each of them reads 512 tokens and writes 32 after it, one after the
other while the others sleep; the best round of each counts. `--apart` loads one model at a time instead, for models
of which memory does not hold them all. A peer that is not installed is left out, and told. What the libraries say on
the way goes to build/speed.log.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

Step = Callable[[list[int], int], tuple[float, float]]
"""Takes a prompt and a number of tokens to write; gives the seconds of the prompt and those of the rest."""

THREADS = int(os.environ.get("OMP_NUM_THREADS", 0)) or os.cpu_count() or 1
NAMES = (
    "fewbits int8",
    "fewbits int4",
    "llama.cpp Q8_0",
    "llama.cpp Q4_0",
    "CTranslate2 int8",
    "torchao W8A8 compiled",
    "bitsandbytes int8",
    "transformers bf16",
)


def main() -> None:
    """Parse, prepare, measure in rounds, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="folder of the model in bf16, with a tokenizer")
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--prompt", type=int, default=512, help="tokens of the prompt")
    parser.add_argument("--new", type=int, default=32, help="tokens written after it")
    parser.add_argument("--only", nargs="+", choices=NAMES, default=NAMES)
    parser.add_argument("--apart", action="store_true", help="one model in memory at a time")
    parser.add_argument("--worker", choices=NAMES, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        serve(options.worker, options.model)
        return
    figures: dict[str, dict[str, float]] = {}
    skipped: dict[str, str] = {}
    workers: dict[str, subprocess.Popen[str]] = {}
    for name in options.only:
        worker, answer = start(name, options.model)
        if "skipped" in answer:
            skipped[name] = answer["skipped"]
            continue
        workers[name] = worker
        if options.apart:
            for _ in range(options.rounds):
                note(figures, name, ask(worker, options.prompt, options.new))
            stop(workers.pop(name))
    for _ in range(options.rounds if workers else 0):
        for name, worker in workers.items():
            note(figures, name, ask(worker, options.prompt, options.new))
    for worker in workers.values():
        stop(worker)
    report = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"), "model": options.model.name, "prompt": options.prompt,
        "new": options.new, "rounds": options.rounds, "threads": THREADS, "figures": figures, "skipped": skipped,
    }  # fmt: skip
    show(report)
    if options.json:
        from fewbits.measure.machine import this_machine

        options.json.write_text(json.dumps(report | {"machine": this_machine().to_json()}, indent=1) + "\n")


def start(name: str, model: Path) -> tuple[subprocess.Popen[str], dict[str, Any]]:
    """A process that holds one model; its first line says that it is ready, or why not."""
    command = [sys.executable, "-W", "ignore", __file__, str(model), "--worker", name]
    with Path("build/speed.log").open("a") as log:
        worker = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True)
    return worker, answer_of(worker)


def ask(worker: subprocess.Popen[str], prompt: int, new: int) -> dict[str, float]:
    """One round of one model."""
    assert worker.stdin
    worker.stdin.write(json.dumps({"prompt": prompt, "new": new}) + "\n")
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


def note(figures: dict[str, dict[str, float]], name: str, round_: dict[str, float]) -> None:
    """Keep the best of each figure."""
    best = figures.setdefault(name, {"prefill": 0.0, "decode": 0.0, "peak_bytes": 0})
    for key, value in round_.items():
        best[key] = max(best[key], value)


def show(report: dict[str, Any]) -> None:
    """Print the figures, and ours over the best of the peers."""
    figures = report["figures"]
    print(f"{report['model']}: {report['prompt']} tokens of prompt, then {report['new']}; {report['threads']} threads")
    for name, one in figures.items():
        peak = one["peak_bytes"] / 1e9
        print(
            f"  {name:24} prefill {one['prefill']:8.1f} tok/s   decode {one['decode']:7.2f} tok/s   peak {peak:5.2f} GB"
        )
    for ours, theirs in (("fewbits int8", "llama.cpp Q8_0"), ("fewbits int4", "llama.cpp Q4_0")):
        if ours not in figures:
            continue
        peers = {name: one for name, one in figures.items() if not name.startswith("fewbits")}
        if ours == "fewbits int8" and peers:
            best = max(peers, key=lambda name: peers[name]["prefill"])
            print(f"  {ours} prefill / {best}: {figures[ours]['prefill'] / peers[best]['prefill']:.2f}")
        if theirs in figures:
            for what in ("prefill", "decode"):
                print(f"  {ours} {what} / {theirs}: {figures[ours][what] / figures[theirs][what]:.2f}")
    for name, reason in report["skipped"].items():
        print(f"  {name} left out: {reason}")


def serve(name: str, model: Path) -> None:
    """Load one model, then time what is asked for, line by line."""
    try:
        step = LOADERS[name](model)
        step(list(range(3, 35)), 2)  # warm up; torchao compiles here
        step(list(range(3, 515)), 2)
    except ImportError as error:
        print(json.dumps({"skipped": str(error)}), flush=True)
        return
    print(json.dumps({"ready": name}), flush=True)
    from fewbits.measure.memory import peak_resident_bytes

    for line in sys.stdin:
        asked = json.loads(line)
        prompt = [3 + 7 * index % 4000 for index in range(asked["prompt"])]
        read, written = step(prompt, asked["new"])
        print(
            json.dumps(
                {
                    "prefill": asked["prompt"] / read,
                    "decode": asked["new"] / written,
                    "peak_bytes": peak_resident_bytes(),
                }
            ),
            flush=True,
        )


def made(model: Path, name: str, make: Callable[[Path], None]) -> Path:
    """What a library runs, made once."""
    path = Path("build/speed") / f"{model.name}-{name}"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_name(f"unfinished-{path.name}")
        shutil.rmtree(unfinished, ignore_errors=True)
        make(unfinished)
        unfinished.rename(path)
    return path


def torch_step(model: Any) -> Step:
    """Time a transformers model: its own forward with its own cache."""
    import torch

    from fewbits.measure.speed import time_once

    torch.set_num_threads(THREADS)

    def step(prompt: list[int], new: int) -> tuple[float, float]:
        return time_once(model, torch.tensor([prompt]), new, {"logits_to_keep": 1})

    return step


def fewbits_model(precision: str) -> Callable[[Path], Step]:
    """A model as fewbits loads it."""

    def load(model: Path) -> Step:
        import fewbits

        return torch_step(fewbits.AutoModelForCausalLM.from_pretrained(model, precision=precision))

    return load


def llama_cpp(type_name: str) -> Callable[[Path], Step]:
    """A GGUF file that fewbits wrote, run by llama.cpp."""

    def load(model: Path) -> Step:
        from llama_cpp import Llama

        import fewbits

        def make(path: Path) -> None:
            fewbits.convert(model, path, to=type_name, layout="gguf")

        file = made(model, f"{type_name}.gguf", make)
        llama = Llama(
            str(file), n_ctx=4608, n_batch=512, n_ubatch=512, n_threads=THREADS, n_threads_batch=THREADS, verbose=False
        )

        def step(prompt: list[int], new: int) -> tuple[float, float]:
            llama.reset()
            started = time.perf_counter()
            llama.eval(prompt)
            read = time.perf_counter()
            for token in range(new):
                llama.eval([5 + token])
            return read - started, time.perf_counter() - read

        return step

    return load


def ctranslate2_int8(model: Path) -> Step:
    """CTranslate2's int8, which quantizes activations too."""
    import ctranslate2

    def make(path: Path) -> None:
        converter = ctranslate2.converters.TransformersConverter(str(model))
        converter.convert(str(path), quantization="int8")

    generator = ctranslate2.Generator(
        str(made(model, "ctranslate2", make)), device="cpu", compute_type="int8", inter_threads=1, intra_threads=THREADS
    )
    words = json.loads((model / "tokenizer.json").read_text())["model"]["vocab"]
    by_id = {index: word for word, index in words.items()}

    def timed(tokens: list[str], new: int) -> float:
        started = time.perf_counter()
        generator.generate_batch(
            [tokens], max_length=new, min_length=new, include_prompt_in_result=False, end_token=[], sampling_topk=1
        )
        return time.perf_counter() - started

    def step(prompt: list[int], new: int) -> tuple[float, float]:
        tokens = [by_id[index] for index in prompt]
        read = timed(tokens, 1)
        return read, timed(tokens, 1 + new) - read

    return step


def torchao_compiled(model: Path) -> Step:
    """The W8A8 of torchao with dynamic scales, compiled."""
    import torch
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_
    from transformers import AutoModelForCausalLM

    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16).eval()
    quantize_(loaded, Int8DynamicActivationInt8WeightConfig())
    loaded.forward = torch.compile(loaded.forward, dynamic=True)
    return torch_step(loaded)


def bitsandbytes_int8(model: Path) -> Step:
    """LLM.int8() on transformers."""
    import bitsandbytes  # noqa: F401
    import torch
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    config = BitsAndBytesConfig(load_in_8bit=True)
    return torch_step(
        AutoModelForCausalLM.from_pretrained(
            model, dtype=torch.bfloat16, quantization_config=config, device_map="cpu"
        ).eval()
    )


def transformers_bf16(model: Path) -> Step:
    """The checkpoint as most people run it."""
    import torch
    from transformers import AutoModelForCausalLM

    return torch_step(AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16).eval())


LOADERS: dict[str, Callable[[Path], Step]] = {
    "fewbits int8": fewbits_model("int8"),
    "fewbits int4": fewbits_model("int4"),
    "llama.cpp Q8_0": llama_cpp("q8_0"),
    "llama.cpp Q4_0": llama_cpp("q4_0"),
    "CTranslate2 int8": ctranslate2_int8,
    "torchao W8A8 compiled": torchao_compiled,
    "bitsandbytes int8": bitsandbytes_int8,
    "transformers bf16": transformers_bf16,
}


if __name__ == "__main__":
    main()
