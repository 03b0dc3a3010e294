"""Two processes train as one: same losses, one decision about every step, checkpoints that go on with the same bits."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from fewbits import FewbitsError, MixedPrecision, Recipe
from train.tiny_gpt import batch, tiny_gpt
from train.two_processes import RECIPES, prepared

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not torch.distributed.is_available() or not torch.distributed.is_gloo_available(),
        reason="torch has no gloo here",
    ),
]
ROOT = Path(__file__).parents[2]
LIMIT = 120  # seconds; a process that waits for another for ever is killed then


@pytest.fixture(scope="module", params=["ddp", "fsdp2"])
def ranks(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What both processes found."""
    folder = tmp_path_factory.mktemp(request.param)
    script = Path(__file__).with_name("two_processes.py")
    running = [
        subprocess.Popen([sys.executable, script, request.param, str(rank), folder], stderr=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    try:
        for process in running:
            _, errors = process.communicate(timeout=LIMIT)
            assert process.returncode == 0, errors
    finally:
        for process in running:
            process.kill()
    return [json.loads((folder / f"{request.param}-{rank}.json").read_text()) for rank in range(2)]


def alone(recipe: Recipe, halves: bool) -> list[list[float]]:
    """Loss, norm and scale of each step of one process, on whole batches or on two halves of each."""
    mp = prepared("one", recipe)
    rows = []
    for step in range(8):
        losses = []
        for part in batch(step).chunk(2) if halves else (batch(step),):
            with mp.forward():
                loss = mp.model(part)
            mp.backward(loss / 2 if halves else loss)
            losses.append(loss.item())
        done = mp.step(max_grad_norm=1.0)
        rows.append([sum(losses) / len(losses), done.grad_norm, done.loss_scale])
    return rows


@pytest.mark.parametrize("name", RECIPES)
def test_the_losses_are_those_of_one_process(ranks: list[dict[str, Any]], name: str) -> None:
    """In float32 up to its rounding. Where matmuls round to less, another order of sums flips a rounding at times.

    So the first step agrees to that rounding in every recipe, and flips add up later: to 1.6e-3 in fp8, as measured.
    """
    one = alone(RECIPES[name], halves=name != "fp32")
    later = {"fp32": 1e-5, "fp16": 1e-4, "fp8": 5e-3, "fp8-delayed": 5e-3}.get(name, 1e-3)
    for step, (first, second) in enumerate(zip(*(rank["train"][name] for rank in ranks), strict=True)):
        of_loss, of_norm = (later, 10 * later) if step else (1e-6, 3e-5)
        assert (first[0] + second[0]) / 2 == pytest.approx(one[step][0], rel=of_loss)
        assert first[1] == second[1] == pytest.approx(one[step][1], rel=of_norm)
        assert first[2] == second[2] == one[step][2]


@pytest.mark.parametrize("what", ["gradient", "loss"])
def test_what_is_not_finite_on_one_process_makes_all_skip(ranks: list[dict[str, Any]], what: str) -> None:
    first, second = (rank[what] for rank in ranks)
    assert first["skipped"]
    assert first["unchanged"]
    assert not math.isfinite(float(first["norm"]))
    expected = ["blocks.0.up.weight", 2, 1] if what == "gradient" else ["loss", 0, 1]
    assert expected in first["culprits"]
    assert {key: value for key, value in first.items() if key != "after"} == {
        key: value for key, value in second.items() if key != "after"
    }
    assert [row[1:] for row in first["after"]] == [row[1:] for row in second["after"]]
    assert all(math.isfinite(row[0]) for row in first["after"])


def test_a_run_that_is_taken_up_ends_with_the_same_bits(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        assert rank["resumed"] == {"fp16": True, "fp8-delayed": True, "state-8bit": True, "sgd": True}


def test_masters_that_cannot_be_shared_are_refused(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        assert "master='split' keeps weights in bf16" in rank["split"]
        assert "take master='fp32'" in rank["split"]


def test_a_checkpoint_that_cannot_be_cut_anew_is_refused(ranks: list[dict[str, Any]]) -> None:
    if "resharded" not in ranks[0]:
        pytest.skip("only shards are cut")
    for rank in ranks:
        assert "8-bit moments the same number of processes" in rank["resharded"]
        assert "no checkpoint of save_sharded is there" in rank["missing"]


def test_other_wrappers_are_refused() -> None:
    model = nn.DataParallel(tiny_gpt())
    with pytest.raises(FewbitsError, match="start a process for each device with torchrun"):
        MixedPrecision(model, torch.optim.AdamW(model.parameters()), "bf16")
    kind = type("FullyShardedDataParallel", (nn.Sequential,), {})
    model = kind(nn.Linear(4, 4))
    with pytest.raises(FewbitsError, match=r"take torch\.distributed\.fsdp\.fully_shard"):
        MixedPrecision(model, torch.optim.AdamW(model.parameters()), "bf16")


def test_the_example_runs_under_torchrun(tmp_path: Path) -> None:
    command = [
        sys.executable, "-W", "error", "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
        ROOT / "examples/torchrun_fsdp2.py", "--steps", "6", "--out", tmp_path,
    ]  # fmt: skip
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "error"}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, start_new_session=True
    ) as process:
        try:
            printed, errors = process.communicate(timeout=LIMIT)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, 9)  # torchrun's children too
    assert process.returncode == 0, errors
    assert "step 6" in printed
    assert (tmp_path / "step-6/.metadata").is_file()
