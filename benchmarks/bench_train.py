"""Mixed-precision training beside torch, in one run: steps, micro-batches, the optimizer's sweep, bytes.

    python benchmarks/bench_train.py MODEL [--only steps micro fp16 sweep bytes] [--json FILE]

MODEL is a folder of SmolLM2-135M, or any causal model. Everything is timed in rounds: a round runs every contender
once, one after the other, and the best round of each counts. All contenders are in memory together (some 2.5 GB each).

steps   a step of 4 × 256 tokens: fewbits in fp32, fp16, bf16 and fp8, torch in fp32 and under autocast in bf16, all
        with clipping and AdamW, torch's fused
micro   the same tokens in 4 micro-batches: fewbits in bf16, torch under autocast in bf16
fp16    fewbits in fp16 and torch's autocast in fp16 with its GradScaler, on one sequence, since torch takes minutes
        for all where the CPU has no fp16; `--full-fp16` takes those minutes
sweep   what follows the gradients: fewbits' step(), and torch's unscale_, clip_grad_norm_, fused AdamW, and the cast
        of the weights for the next forward pass
bytes   of weights, their copies, gradients and states per parameter: storages that live before a step
"""

from __future__ import annotations

import argparse
import gc
import json
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from fewbits import AutoTokenizer, MixedPrecision, Recipe
from fewbits.measure.machine import this_machine
from fewbits.measure.text import token_windows

SECTIONS = ("steps", "micro", "fp16", "sweep", "bytes")
Train = Callable[[list[Tensor]], float]
"""Trains one step on micro-batches of token ids ``[B, T]``; gives the loss of the last."""


@dataclass
class Contender:
    """One way to train, with a model of its own."""

    train: Train
    best: float = float("inf")


def main() -> None:
    """Parse, measure section by section, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="folder of a causal model with a tokenizer")
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=SECTIONS)
    parser.add_argument("--contenders", nargs="+", help="of the section steps, as in: 'fewbits bf16'")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batch", type=int, default=4, help="sequences of a step")
    parser.add_argument("--tokens", type=int, default=256, help="tokens of a sequence")
    parser.add_argument("--fp16-tokens", type=int, default=256, help="tokens of the one sequence of section fp16")
    parser.add_argument("--full-fp16", action="store_true", help="section fp16 on all tokens: minutes")
    parser.add_argument("--json", type=Path, help="write the figures here; sections that are there already stay")
    options = parser.parse_args()
    figures: dict[str, Any] = {}
    if options.json and options.json.exists():
        figures = json.loads(options.json.read_text())["figures"]
    for section in options.only:
        figures[section] = MEASURES[section](options)
        print(f"{section}: {figures[section]}", flush=True)
    report = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"), "model": options.model.name, "batch": options.batch,
        "tokens": options.tokens, "rounds": options.rounds, "figures": figures, "machine": this_machine().to_json(),
    }  # fmt: skip
    show(report)
    if options.json:
        options.json.write_text(json.dumps(report, indent=1) + "\n")


def batches(options: argparse.Namespace, micro: int = 1) -> list[Tensor]:
    """Token ids of a step, ``[B, T]`` in so many parts."""
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    return list(token_windows(tokenizer, windows=options.batch, window_tokens=options.tokens).chunk(micro))


def load(options: argparse.Namespace) -> nn.Module:
    """The model in fp32."""
    model: nn.Module = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32).train()
    return model


def loss_of(model: nn.Module, ids: Tensor) -> Tensor:
    """What transformers computes."""
    loss: Tensor = model(input_ids=ids, labels=ids, use_cache=False).loss
    return loss


def fewbits(model: nn.Module, recipe: str | Recipe) -> Train:
    """Our three lines, with torch's AdamW as the user gives it."""
    mp = MixedPrecision(model, torch.optim.AdamW(model.parameters(), lr=1e-5), recipe)

    def train(micro_batches: list[Tensor]) -> float:
        for ids in micro_batches:
            with mp.forward():
                loss = loss_of(model, ids)
            mp.backward(loss / len(micro_batches))
        mp.step(max_grad_norm=1.0)
        return loss.item()

    return train


def autocast(model: nn.Module, dtype: torch.dtype | None) -> Train:
    """Torch's loop: autocast unless in fp32, GradScaler in fp16, clipping, fused AdamW."""
    parameters = list(model.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=1e-5, fused=True)
    scaler = torch.amp.GradScaler("cpu", enabled=dtype == torch.float16)

    def train(micro_batches: list[Tensor]) -> float:
        for ids in micro_batches:
            with torch.autocast("cpu", dtype=dtype or torch.bfloat16, enabled=dtype is not None):
                loss = loss_of(model, ids)
            scaler.scale(loss / len(micro_batches)).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(parameters, 1.0)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        return loss.item()

    return train


WAYS: dict[str, Callable[[nn.Module], Train]] = {
    "fewbits fp32": lambda model: fewbits(model, "fp32"),
    "fewbits fp16": lambda model: fewbits(model, "fp16"),
    "fewbits bf16": lambda model: fewbits(model, "bf16"),
    "fewbits fp8": lambda model: fewbits(model, "fp8"),
    "torch fp32": lambda model: autocast(model, None),
    "torch bf16": lambda model: autocast(model, torch.bfloat16),
    "torch fp16": lambda model: autocast(model, torch.float16),
}


def race(options: argparse.Namespace, names: list[str], step: list[Tensor], warm: list[Tensor]) -> dict[str, float]:
    """Seconds of a step, the best of the rounds."""
    contenders = {name: Contender(WAYS[name](load(options))) for name in names}
    for one in contenders.values():
        one.train(warm)
    for done in range(options.rounds):
        for name, one in contenders.items():
            started = time.perf_counter()
            one.train(step)
            seconds = time.perf_counter() - started
            one.best = min(one.best, seconds)
            print(f"  round {done + 1}, {name}: {seconds:.2f} s", flush=True)
    return {name: one.best for name, one in contenders.items()}


def steps(options: argparse.Namespace) -> dict[str, float]:
    """All of 4 × 256 tokens at once."""
    step = batches(options)
    names = options.contenders or [name for name in WAYS if name != "torch fp16"]
    return race(options, names, step, step)


def micro(options: argparse.Namespace) -> dict[str, float]:
    """The same in four parts."""
    step = batches(options, micro=4)
    return race(options, ["fewbits bf16", "torch bf16"], step, step[:1])


def fp16(options: argparse.Namespace) -> dict[str, float]:
    """Against torch's own fp16; one round of it, on few tokens."""
    step = batches(options)
    if not options.full_fp16:
        step = [step[0][:1, : options.fp16_tokens]]
    options = argparse.Namespace(**{**vars(options), "rounds": 1})
    warm = [step[0][:1, :8]]
    return {"tokens": step[0].numel(), **race(options, ["fewbits fp16", "torch fp16", "fewbits fp32"], step, warm)}


def sweep(options: argparse.Namespace) -> dict[str, float]:
    """From gradients to weights and their copies; the gradients come from a few tokens, untimed."""
    ids = batches(options)[0][:1, :8]
    ours, theirs = load(options), load(options)
    mp = MixedPrecision(ours, torch.optim.AdamW(ours.parameters(), lr=1e-5), "fp16")
    parameters = list(theirs.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=1e-5, fused=True)
    scaler = torch.amp.GradScaler("cpu")
    copies: list[Tensor] = []

    def torch_sweep() -> None:
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(parameters, 1.0)
        scaler.step(optimizer)
        scaler.update()
        copies.clear()  # autocast lets go of its copies, too, and makes new ones
        copies[:] = [param.detach().to(torch.float16) for param in parameters if param.ndim > 1]

    best = {"fewbits": float("inf"), "torch": float("inf")}
    for _ in range(4 * options.rounds):
        with mp.forward():
            loss = loss_of(ours, ids)
        mp.backward(loss)
        started = time.perf_counter()
        step = mp.step(max_grad_norm=1.0)
        if not step.skipped:  # a skipped one does less
            best["fewbits"] = min(best["fewbits"], time.perf_counter() - started)
        optimizer.zero_grad()
        scaler.scale(loss_of(theirs, ids)).backward()
        started = time.perf_counter()
        torch_sweep()
        best["torch"] = min(best["torch"], time.perf_counter() - started)
    return best


RECIPES = {
    "classic: fp16": Recipe.named("fp16"),
    "split masters": replace(Recipe.named("bf16"), master="split"),
    "split masters, bf16 states": replace(Recipe.named("bf16"), master="split", state="bf16"),
    "stochastic masters, 8-bit states": replace(Recipe.named("bf16"), master="stochastic", state="8bit"),
}


def bytes_(options: argparse.Namespace) -> dict[str, float]:
    """Bytes per parameter that live when the gradients are there, by recipe."""
    ids = batches(options)[0][:1, :8]
    found: dict[str, float] = {}
    for name, recipe in RECIPES.items():
        gc.collect()
        before = live_bytes()
        model = load(options)
        mp = MixedPrecision(model, torch.optim.AdamW(model.parameters(), lr=1e-5), recipe)
        for last in (False, True):
            with mp.forward():
                loss = loss_of(model, ids)
            mp.backward(loss)
            if not last:
                mp.step(max_grad_norm=1.0)
        del loss
        gc.collect()
        found[name] = (live_bytes() - before) / sum(param.numel() for param in model.parameters())
        del model, mp
    return found


def live_bytes() -> int:
    """Bytes of all storages of tensors that live in this process, each once."""
    storages: dict[int, int] = {}
    for one in gc.get_objects():
        if isinstance(one, Tensor):
            for tensor in (one, one.grad if one.is_leaf else None):
                if tensor is not None:
                    storage = tensor.untyped_storage()
                    storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


MEASURES: dict[str, Callable[[argparse.Namespace], dict[str, float]]] = {
    "steps": steps, "micro": micro, "fp16": fp16, "sweep": sweep, "bytes": bytes_,
}  # fmt: skip


def show(report: dict[str, Any]) -> None:
    """Print the figures, and what is wanted of them."""
    figures = report["figures"]
    for section, found in figures.items():
        unit = "bytes per parameter" if section == "bytes" else "s"
        for name, value in found.items():
            print(f"{section:6} {name:34} {value:9.3f} {'' if name == 'tokens' else unit}")
    for section, above, below, wanted in WANTED:
        found = figures.get(section, {})
        if above in found and below in found:
            print(f"{section:6} {above} / {below}: {found[above] / found[below]:.2f}, wanted {wanted}")
    for name, most in {"classic: fp16": 16, "split masters": 14, "split masters, bf16 states": 10,
                       "stochastic masters, 8-bit states": 7}.items():  # fmt: skip
        if name in figures.get("bytes", {}):
            print(f"bytes  {name}: {figures['bytes'][name]:.2f}, wanted at most {most}")
    machine = report["machine"]
    print(f"{report['model']}, {report['batch']} × {report['tokens']} tokens; {report['date']}; {machine['cpu']}, "
          f"{machine['threads']} threads, {machine['isa']}, torch {machine['versions']['torch']}")  # fmt: skip


WANTED = (
    ("steps", "fewbits fp16", "fewbits fp32", "at most 1.25"),
    ("steps", "fewbits fp8", "fewbits fp32", "at most 1.5"),
    ("steps", "torch bf16", "fewbits bf16", "at least 1.05"),
    ("micro", "torch bf16", "fewbits bf16", "at least 1.2"),
    ("fp16", "torch fp16", "fewbits fp16", "at least 20"),
    ("sweep", "torch", "fewbits", "at least 1.8"),
)


if __name__ == "__main__":
    main()
