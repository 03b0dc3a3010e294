"""The Trainer of transformers with a recipe: accumulation, clipping, schedules, checkpoints."""

from __future__ import annotations

import dataclasses
import math
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments

from fewbits import FewbitsError, MixedPrecision, Recipe
from fewbits.train import MixedPrecisionTrainer
from fewbits.train.trainer import STATE_FILE, _check

ROOT = Path(__file__).parents[2]
BF16 = Recipe.named("bf16")


def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2)
    )


def rows() -> list[dict[str, list[int]]]:
    tokens = [[(start + stride * place) % 64 for place in range(12)] for start in range(12) for stride in (1, 3)]
    return [{"input_ids": row, "labels": row} for row in tokens]


def trainer(out: Path, precision: str | Recipe | None, **options: Any) -> Trainer:
    callbacks = options.pop("callbacks", [])
    args = TrainingArguments(
        str(out),
        **{
            "max_steps": 6, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "learning_rate": 1e-2,
            "logging_steps": 1, "disable_tqdm": True, "save_strategy": "no", "use_cpu": True, "max_grad_norm": 0.5,
        } | options,
    )  # fmt: skip
    kind: Any = Trainer if precision is None else MixedPrecisionTrainer
    more = {} if precision is None else {"precision": precision}
    return kind(model=model(), args=args, train_dataset=rows(), eval_dataset=rows()[:4], callbacks=callbacks, **more)


def logged(trained: Trainer, name: str) -> list[float]:
    return [row[name] for row in trained.state.log_history if name in row]


@pytest.mark.parametrize("max_grad_norm", [0.5, 0.0])
def test_fp32_is_the_trainer_itself(tmp_path: Path, max_grad_norm: float) -> None:
    """Accumulation, clipping, decay and schedule are the Trainer's."""
    ours, its = (trainer(tmp_path, precision, max_grad_norm=max_grad_norm) for precision in ("fp32", None))
    ours.train()
    its.train()
    for name in ("loss", "grad_norm", "learning_rate"):
        assert logged(ours, name) == pytest.approx(logged(its, name), rel=1e-4)
    for mine, theirs in zip(ours.model.parameters(), its.model.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-4)


def test_a_skipped_step_holds_the_schedule_and_is_logged(tmp_path: Path) -> None:
    class Spoil(TrainerCallback):
        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
            if state.global_step == 2:
                model.lm_head.weight.grad[0, 0] = math.inf

    trained = trainer(tmp_path, "fp16", callbacks=[Spoil()])
    trained.train()
    assert logged(trained, "skipped_steps") == [0, 0, 1, 1, 1, 1]
    assert logged(trained, "loss_scale")[2] < logged(trained, "loss_scale")[1]
    rates = logged(trained, "learning_rate")
    assert rates[3] == rates[2]
    assert rates[4] < rates[3]
    assert not math.isfinite(logged(trained, "grad_norm")[2])


class Stop(TrainerCallback):
    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        control.should_training_stop = state.global_step == 4


@pytest.mark.parametrize(
    ("precision", "options"),
    [
        ("fp16", {}),
        (dataclasses.replace(BF16, master="split", state="8bit"), {}),
        ("bf16", {"optim": "adagrad"}),
    ],
    ids=["fp16", "split-8bit", "adagrad"],
)
def test_a_run_that_is_resumed_ends_with_the_same_bits(tmp_path: Path, precision: Any, options: Any) -> None:
    options = {"save_strategy": "steps", "save_steps": 4, **options}
    whole = trainer(tmp_path / "whole", precision, **options)
    whole.train()
    trainer(tmp_path / "cut", precision, callbacks=[Stop()], **options).train()
    resumed = trainer(tmp_path / "cut", precision, **options)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 6
    assert logged(resumed, "loss") == logged(whole, "loss")
    for ours, its in zip(resumed.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(ours, its)


def test_evaluation_runs_by_the_recipe_and_changes_nothing(tmp_path: Path) -> None:
    recipe = dataclasses.replace(Recipe.named("fp8"), scaling="delayed")
    plain = trainer(tmp_path, recipe)
    plain.train()
    evaluated = trainer(tmp_path, recipe, eval_strategy="steps", eval_steps=1)
    evaluated.train()
    assert len(logged(evaluated, "eval_loss")) == 6
    assert logged(evaluated, "loss") == logged(plain, "loss")


def test_another_precision_in_the_arguments_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FewbitsError, match="bf16=True lets accelerate cast too"):
        trainer(tmp_path, "bf16", bf16=True)


def test_engines_that_a_recipe_cannot_follow_are_refused() -> None:
    def asking(**options: Any) -> Any:
        plain = {"is_deepspeed_enabled": False, "is_fsdp_enabled": False, "recipe": BF16}
        return SimpleNamespace(**{**plain, "args": SimpleNamespace(n_gpu=options.pop("n_gpu", 1)), **options})

    with pytest.raises(FewbitsError, match="deepspeed shards the optimizer by itself"):
        _check(asking(is_deepspeed_enabled=True))
    with pytest.raises(FewbitsError, match="fsdp shards the optimizer by itself"):
        _check(asking(is_fsdp_enabled=True))
    with pytest.raises(FewbitsError, match="one process would drive 2 GPUs"):
        _check(asking(n_gpu=2))


def test_a_checkpoint_of_another_trainer_or_recipe_is_refused(tmp_path: Path) -> None:
    options = {"save_strategy": "steps", "save_steps": 2, "max_steps": 2}
    trainer(tmp_path, "bf16", **options).train()
    with pytest.raises(FewbitsError, match="resume with the same recipe"):
        trainer(tmp_path, "fp16", **options | {"max_steps": 4}).train(resume_from_checkpoint=True)
    (tmp_path / "checkpoint-2" / STATE_FILE).unlink()
    with pytest.raises(FewbitsError, match=f"no {STATE_FILE} in the checkpoint"):
        trainer(tmp_path, "bf16", **options).train(resume_from_checkpoint=True)


def test_evaluating_leaves_no_trace() -> None:
    network = model()
    mp = MixedPrecision(
        network, torch.optim.AdamW(network.parameters()), dataclasses.replace(Recipe.named("fp8"), scaling="delayed")
    )
    with mp.evaluating(), torch.no_grad():
        network(torch.tensor([[1, 2, 3]]))
    assert mp.policy.history._now == {}


@pytest.mark.slow
def test_the_example_runs(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, ROOT / "examples/trainer.py", "--steps", "10", "--out", tmp_path],
        capture_output=True, text=True, timeout=120, check=False, env=os.environ | {"PYTHONWARNINGS": "error"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "loss_scale" in done.stdout
    assert (tmp_path / "checkpoint-10" / STATE_FILE).is_file()
