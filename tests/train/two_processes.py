"""What test_distributed.py runs on each of two gloo processes: python two_processes.py ddp|fsdp2 RANK FOLDER."""

from __future__ import annotations

import dataclasses
import json
import math
import sys
import warnings
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from torch import Tensor, distributed, nn
from torch.distributed.fsdp import fully_shard

from fewbits import FewbitsError, MixedPrecision, Recipe
from fewbits.train.sharded_checkpoint import load_sharded, save_sharded
from train.tiny_gpt import batch, tiny_gpt

BF16, FP8 = Recipe.named("bf16"), Recipe.named("fp8")
RECIPES = {
    "fp32": Recipe.named("fp32"),
    "fp16": dataclasses.replace(Recipe.named("fp16"), keep=("head",)),
    "bf16": BF16,
    "fp8": FP8,
    "fp8-delayed": dataclasses.replace(FP8, scaling="delayed"),
    "state-8bit": dataclasses.replace(BF16, state="8bit"),
}


def wrapped(kind: str) -> nn.Module:
    model = tiny_gpt(tied=kind != "fsdp2-untied")
    if kind == "ddp":
        return nn.parallel.DistributedDataParallel(model)
    if kind != "one":
        for block in model.blocks:
            fully_shard(block)
        fully_shard(model)
    return model


def prepared(kind: str, recipe: Recipe, momentum: float | None = None) -> MixedPrecision:
    model = wrapped(kind)
    if momentum is not None:
        return MixedPrecision(model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=momentum), recipe)
    return MixedPrecision(model, torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.01), recipe)


def train(mp: MixedPrecision, first: int, last: int, rank: int) -> list[list[float]]:
    """Loss here, norm and scale of each step; this process's half of each batch."""
    rows = []
    for step in range(first, last):
        with mp.forward():
            loss = mp.model(batch(step).chunk(2)[rank])
        mp.backward(loss)
        done = mp.step(max_grad_norm=1.0)
        rows.append([loss.item(), done.grad_norm, done.loss_scale])
    return rows


def weights(mp: MixedPrecision) -> list[Tensor]:
    named = mp.state_dict()["model"].values()
    return [tensor.full_tensor().clone() if hasattr(tensor, "full_tensor") else tensor.clone() for tensor in named]


def same(ours: list[Tensor], its: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(ours, its, strict=True))


def planted(kind: str, rank: int, what: str) -> dict[str, Any]:
    """One process alone has something that is not finite."""
    mp = prepared(kind, RECIPES["fp16"])
    train(mp, 0, 2, rank)
    before = weights(mp)
    with mp.forward():
        loss = mp.model(batch(2).chunk(2)[rank])
    if what == "loss":
        mp.backward(loss * math.nan if rank == 1 else loss)
    else:
        mp.backward(loss)
        if rank == 1:
            grad = dict(mp._bare.named_parameters())["blocks.0.up.weight"].grad
            rows = grad.to_local() if hasattr(grad, "to_local") else grad
            rows[0, :2] = math.inf
            rows[1, 0] = math.nan
    step = mp.step()
    return {
        "skipped": step.skipped,
        "culprits": sorted({(one.name, one.infinite, one.nan) for one in step.culprits if one.name in NAMED}),
        "unchanged": same(before, weights(mp)),
        "scale": mp.loss_scale,
        "norm": repr(step.grad_norm),
        "after": train(mp, 3, 5, rank),
    }


NAMED = ("loss", "blocks.0.up.weight")


def resumed(kind: str, rank: int, folder: Path, recipe: Recipe, momentum: float | None = None) -> bool:
    """A run that was saved in the middle ends with the same bits when it is taken up."""
    first = prepared(kind, recipe, momentum)
    train(first, 0, 3, rank)
    save_sharded(first, folder, run={"steps": 3})
    train(first, 3, 6, rank)
    second = prepared(kind, recipe, momentum)
    assert load_sharded(second, folder, run={"steps": 0}) == {"run": {"steps": 3}}
    train(second, 3, 6, rank)
    return same(weights(first), weights(second))


def error(action: Any) -> str:
    try:
        action()
    except FewbitsError as caught:
        return str(caught)
    return "none"


def main(kind: str, rank: int, folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = {"train": {n: train(prepared(kind, recipe), 0, 8, rank) for n, recipe in RECIPES.items()}}
    found["gradient"], found["loss"] = planted(kind, rank, "gradient"), planted(kind, rank, "loss")
    found["split"] = error(lambda: prepared(kind, dataclasses.replace(BF16, master="split")))
    found["resumed"] = {
        n: resumed(kind, rank, folder / f"{kind}-{n}", RECIPES[n]) for n in ("fp16", "fp8-delayed", "state-8bit")
    }
    found["resumed"]["sgd"] = resumed(kind, rank, folder / f"{kind}-sgd", BF16, momentum=0.9)
    if kind == "fsdp2":
        found["resharded"] = error(
            lambda: load_sharded(prepared("one", RECIPES["state-8bit"]), folder / "fsdp2-state-8bit")
        )
        found["missing"] = error(lambda: load_sharded(prepared(kind, BF16), folder / "nothing"))
    return found


if __name__ == "__main__":
    warnings.simplefilter("error")
    torch.set_num_threads(1)
    kind, rank, folder = sys.argv[1], int(sys.argv[2]), Path(sys.argv[3])
    distributed.init_process_group("gloo", f"file://{folder}/{kind}.store", rank=rank, world_size=2)
    (folder / f"{kind}-{rank}.json").write_text(json.dumps(main(kind, rank, folder)))
    distributed.destroy_process_group()
