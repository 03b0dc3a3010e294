"""Training in fp16, bf16 and fp8 ends where fp32 ends; without loss scaling, or without master weights, it does not.

    python benchmarks/train_parity.py DIR [--model build/smollm2-bf16] [--only gpt] [--seconds S]
    python benchmarks/train_parity.py DIR --json FILE --picture FILE

Two tasks, on the text of Python's help topics: a small GPT over bytes, from scratch, and the upper fifth of
SmolLM2-135M, fine-tuned. Each is trained by each recipe from three seeds, which choose the first weights (of the GPT)
and the order of the text; recipes of one seed see the same batches. What is compared is the loss on held-out text at
the end, always computed in fp32: a recipe is at parity if the mean of its seeds lies among the seeds of fp32.

A step stands for one of 2^19 tokens (the batch of GPT-3 Small), of which a laptop computes one micro-batch: its loss is
divided by the number of micro-batches, as in such a run, and so are the norm to clip at and the epsilon of AdamW, which
makes the update that of the whole. The gradients are then as small inside the model as they are in large runs, which is
what loss scaling is for.

A run is a process' work of minutes and leaves one file in DIR; runs that have theirs are not done again.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from small_gpt import SmallGPT
from torch import Tensor, nn

from fewbits import MixedPrecision, Recipe
from fewbits.measure.machine import this_machine
from fewbits.measure.text import built_in_text, token_windows

SEEDS = (0, 1, 2)
STEP_TOKENS = 2**19
RECIPES = {
    "fp32": Recipe.named("fp32"),
    "fp16": Recipe.named("fp16"),
    "bf16": Recipe.named("bf16"),
    "fp8": Recipe.named("fp8"),
    "fp16 without loss scaling": replace(Recipe.named("fp16"), loss_scaling=None),
    "bf16 without masters": Recipe.named("bf16"),
}
FAILURES = ("fp16 without loss scaling", "bf16 without masters")


@dataclass(frozen=True)
class Task:
    """What is trained, and how.

    Attributes:
        model: Makes the model of a seed.
        loss: Of a model on a batch of token ids ``[B, T]``.
        train: Token ids ``[windows, T]``.
        held_out: Token ids ``[batches, B, T]``.
        batch: Windows in a micro-batch (B).
    """

    model: Callable[[int], nn.Module]
    loss: Callable[[nn.Module, Tensor], Tensor]
    train: Tensor
    held_out: Tensor
    batch: int
    steps: int
    lr: float
    weight_decay: float
    look_every: int


def gpt(options: argparse.Namespace) -> Task:
    """A GPT of 0.8M parameters over bytes, from scratch."""
    ids = torch.frombuffer(bytearray(built_in_text().encode()), dtype=torch.uint8).long()
    windows = ids[: len(ids) // 64 * 64].view(-1, 64)
    shuffled = windows[torch.randperm(len(windows), generator=torch.Generator().manual_seed(0))]

    def model(seed: int) -> nn.Module:
        torch.manual_seed(seed)
        return SmallGPT(vocabulary=256, context=64, width=128, layers=4, heads=4)

    def loss(model: nn.Module, ids: Tensor) -> Tensor:
        logits = model(ids[:, :-1])
        return nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())

    return Task(
        model, loss, train=shuffled[:-256], held_out=shuffled[-256:].view(2, 128, 64), batch=12, steps=400, lr=1e-3,
        weight_decay=0.1, look_every=50,
    )  # fmt: skip


def smollm2(options: argparse.Namespace) -> Task:
    """SmolLM2-135M, its upper 6 of 30 layers fine-tuned, with windows of 32 tokens."""
    from transformers import AutoModelForCausalLM

    from fewbits import AutoTokenizer

    windows = token_windows(AutoTokenizer.from_pretrained(options.model), windows=3000, window_tokens=32)
    held_out = windows[-24:].view(6, 1, 128)  # 128 tokens that follow each other

    def model(seed: int) -> nn.Module:
        loaded = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32).requires_grad_(False).train()
        loaded.model.layers[24:].requires_grad_(True)
        return loaded

    def loss(model: nn.Module, ids: Tensor) -> Tensor:
        return model(input_ids=ids, labels=ids, use_cache=False).loss

    return Task(
        model, loss, train=windows[:-24], held_out=held_out, batch=1, steps=300, lr=5e-5, weight_decay=0.0,
        look_every=60,
    )  # fmt: skip


TASKS = {"gpt": gpt, "smollm2": smollm2}


def main() -> None:
    """Do the runs that are missing, or show those that are there."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="a file for every run")
    parser.add_argument("--model", default="build/smollm2-bf16", help="folder of SmolLM2-135M")
    parser.add_argument("--only", choices=TASKS, help="one task")
    parser.add_argument("--seconds", type=float, default=math.inf, help="start no run that would end after these")
    parser.add_argument("--json", type=Path, help="write what the runs that are there came to, and run nothing")
    parser.add_argument("--picture", type=Path, help="draw it as PNG or SVG; needs matplotlib")
    options = parser.parse_args()
    if options.json or options.picture:
        report = summary(options.folder)
        show(report)
        if options.json:
            options.json.write_text(json.dumps(report, indent=1) + "\n")
        if options.picture:
            from parity_picture import draw

            draw(report, options.picture)
        return
    left = missing(options.folder, [options.only] if options.only else list(TASKS))
    print(f"{len(left)} runs to do", flush=True)
    started, longest = time.perf_counter(), 0.0
    for task, recipe, seed in left:
        begun = time.perf_counter()
        if begun - started + 1.2 * longest > options.seconds:
            return
        result = train(TASKS[task](options), recipe, seed)
        path = path_of(options.folder, task, recipe, seed)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"task": task, "recipe": recipe, "seed": seed, **result}) + "\n")
        print(
            f"{task}, {recipe}, seed {seed}: {result['held_out'][-1][1]:.4f} in {result['seconds']:.0f} s", flush=True
        )
        longest = max(longest, time.perf_counter() - begun)


def path_of(folder: Path, task: str, recipe: str, seed: int) -> Path:
    """The file of a run."""
    return folder / task / f"{recipe.replace(' ', '-')}-{seed}.json"


def missing(folder: Path, tasks: list[str]) -> list[tuple[str, str, int]]:
    """The runs without a file, seed by seed; the failures' further seeds last."""
    runs = [(task, recipe, seed) for task in tasks for seed in SEEDS for recipe in RECIPES]
    runs.sort(key=lambda run: run[1] in FAILURES and run[2] > 0)
    return [run for run in runs if not path_of(folder, *run).exists()]


def train(task: Task, recipe: str, seed: int) -> dict[str, Any]:
    """One run: the loss of every step, and that on held-out text from time to time."""
    model = task.model(seed)
    trained = [param for param in model.parameters() if param.requires_grad]
    micro_batches = STEP_TOKENS // (task.batch * task.train.shape[1])
    optimizer = torch.optim.AdamW(
        trained, lr=task.lr, betas=(0.9, 0.95), eps=1e-8 / micro_batches, weight_decay=task.weight_decay
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate(step, task.steps))
    mp = MixedPrecision(model, optimizer, RECIPES[recipe])
    order = torch.randint(len(task.train), (task.steps, task.batch), generator=torch.Generator().manual_seed(seed))
    losses, scales, skipped, started = [], [], 0, time.perf_counter()
    held_out = [(0, look(task, model))]
    for index in range(task.steps):
        with mp.forward():
            loss = task.loss(model, task.train[order[index]])
        mp.backward(loss / micro_batches)
        step = mp.step(max_grad_norm=1 / micro_batches)
        if recipe == "bf16 without masters":
            forget_masters(trained)
        skipped += step.skipped
        schedule.step()
        losses.append(round(loss.item(), 5))
        scales.append(step.loss_scale)
        if (index + 1) % task.look_every == 0:
            held_out.append((index + 1, look(task, model)))
    return {
        "held_out": held_out, "losses": losses, "scales": [min(scales), max(scales), scales[-1]], "skipped": skipped,
        "steps": task.steps, "micro_batches": micro_batches, "parameters": sum(param.numel() for param in trained),
        "seconds": time.perf_counter() - started,
    }  # fmt: skip


def rate(step: int, steps: int) -> float:
    """The learning rate over its peak: up in 20 steps, then down along a cosine to a tenth."""
    if step < 20:
        return (step + 1) / 20
    return 0.1 + 0.45 * (1 + math.cos(math.pi * (step - 20) / (steps - 20)))


@torch.no_grad()
def forget_masters(parameters: list[nn.Parameter]) -> None:
    """Keep of every weight what bfloat16 holds: the update was fp32's, the weight is rounded to nearest."""
    for param in parameters:
        param.copy_(param.bfloat16())


@torch.no_grad()
def look(task: Task, model: nn.Module) -> float:
    """The loss on held-out text, in fp32."""
    return round(sum(float(task.loss(model, batch)) for batch in task.held_out) / len(task.held_out), 5)


def summary(folder: Path) -> dict[str, Any]:
    """What the runs came to, by task and recipe."""
    tasks: dict[str, Any] = {}
    for name in TASKS:
        runs = [json.loads(path.read_text()) for path in sorted((folder / name).glob("*.json"))]
        if not any(run["recipe"] == "fp32" for run in runs):
            continue
        tasks[name] = {
            "steps": runs[0]["steps"], "parameters": runs[0]["parameters"], "micro_batches": runs[0]["micro_batches"],
            "recipes": {recipe: outcome([run for run in runs if run["recipe"] == recipe]) for recipe in RECIPES},
        }  # fmt: skip
    for task in tasks.values():
        judge(task["recipes"])
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"), "tasks": tasks, "machine": this_machine().to_json(),
    }  # fmt: skip


def outcome(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """The seeds of one recipe."""
    final = [run["held_out"][-1][1] for run in runs]
    return {
        "final": final, "mean": sum(final) / max(1, len(final)), "seeds": [run["seed"] for run in runs],
        "held_out": [run["held_out"] for run in runs], "skipped": [run["skipped"] for run in runs],
        "scales": [run["scales"] for run in runs],
    }  # fmt: skip


def judge(recipes: dict[str, Any]) -> None:
    """Hold every recipe against the seeds of fp32; a loss that is not a number is among none."""
    base = recipes["fp32"]["final"]
    for one in recipes.values():
        one["from_fp32"] = one["mean"] - recipes["fp32"]["mean"]
        one["spread"] = max(base) - min(base)
        one["parity"] = bool(one["final"]) and min(base) <= one["mean"] <= max(base)


def show(report: dict[str, Any]) -> None:
    """Print a table for each task."""
    for name, task in report["tasks"].items():
        print(f"{name}: {task['parameters'] / 1e6:.1f}M trained, {task['steps']} steps")
        for recipe, one in task["recipes"].items():
            if not one["final"]:
                print(f"  {recipe:28} no run yet")
                continue
            seeds = " ".join(f"{loss:.4f}" for loss in one["final"])
            verdict = (
                "among fp32's seeds" if one["parity"] else f"{abs(one['from_fp32']) / one['spread']:.1f} spreads away"
            )
            print(f"  {recipe:28} {seeds}   mean {one['mean']:.4f}, {one['from_fp32']:+.4f}, {verdict}; "
                  f"skipped {one['skipped']}")  # fmt: skip


if __name__ == "__main__":
    main()
