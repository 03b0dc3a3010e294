"""The Trainer of transformers with fewbits' recipes: ``MixedPrecisionTrainer(..., precision="fp16")``.

What the Trainer calls and who answers:

    compute_loss_context_manager        mp.forward, or mp.evaluating where no gradient is needed
    accelerator.backward                mp.backward
    accelerator.clip_grad_norm_         nobody: the step clips; it fills in the norm that is logged
    optimizer.step                      mp.step, which skips for the learning-rate schedule too
    on_save                             a file beside the Trainer's own: masters, moments, loss scale
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from transformers import Trainer, TrainerCallback
from transformers.trainer_utils import get_last_checkpoint

from fewbits.errors import FewbitsError
from fewbits.train.mixed_precision import MixedPrecision
from fewbits.train.recipe import Recipe

STATE_FILE = "mixed_precision.pt"
_KEPT_BY_TRAINER = ("model", "optimizer")  # in files of its own


class MixedPrecisionTrainer(Trainer):  # type: ignore[misc]  # transformers is not type-checked
    """A ``transformers.Trainer`` whose training follows a recipe.

    Everything else is the Trainer's: gradient accumulation, ``max_grad_norm``, schedules (held while steps are
    skipped), checkpoints, resuming (with the same bits), DDP under torchrun. Logs get ``loss_scale`` and
    ``skipped_steps``.

    Args:
        args: As for the Trainer, by position or by name.
        precision: fp32, fp16, bf16, fp8, or a ``Recipe``.
        options: As for the Trainer.

    Raises:
        FewbitsError: Arguments that ask for another mixed precision, for FSDP or DeepSpeed, or for one process that
            drives several GPUs.
    """

    def __init__(self, *args: Any, precision: str | Recipe = "bf16", **options: Any) -> None:
        self.recipe = Recipe.named(precision)
        super().__init__(*args, **options)
        _check(self)
        self.mixed_precision: MixedPrecision | None = None
        self.skipped_steps = 0
        self._resume_from: Path | None = None
        self._ready = False
        self._norm = torch.zeros((), dtype=torch.float64)
        self.accelerator.backward = self._backward
        self.accelerator.clip_grad_norm_ = self._norm_to_come
        self.add_callback(_SaveState(self))

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **options: Any) -> Any:
        """Train, as the Trainer does.

        Raises:
            FewbitsError: The checkpoint was made by a Trainer without a recipe, or with another one.
        """
        found = get_last_checkpoint(self.args.output_dir) if resume_from_checkpoint is True else resume_from_checkpoint
        self._resume_from, self._ready = Path(found) if found else None, False
        if self._resume_from and not (self._resume_from / STATE_FILE).is_file():
            raise FewbitsError(
                f"{self._resume_from}: no {STATE_FILE} in the checkpoint, so it was not made by MixedPrecisionTrainer; "
                "load the model from it and begin a new run, or resume with the Trainer that made it"
            )
        return super().train(resume_from_checkpoint, *args, **options)

    def training_step(self, model: nn.Module, *args: Any, **options: Any) -> Tensor:
        """Forward and backward of one micro-batch."""
        if not self._ready:
            self._set_up(model)
        loss: Tensor = super().training_step(model, *args, **options)
        return loss

    def compute_loss_context_manager(self) -> Any:
        """Where the model runs: by the recipe."""
        stack = super().compute_loss_context_manager()
        if self.mixed_precision is not None:
            training = torch.is_grad_enabled()
            stack.enter_context(self.mixed_precision.forward() if training else self.mixed_precision.evaluating())
        return stack

    def log(self, logs: dict[str, float], *args: Any, **options: Any) -> None:
        """Log, and with the loss the scale that it had and how many steps were skipped so far."""
        if "loss" in logs and self.mixed_precision is not None:
            logs = {**logs, "loss_scale": self.mixed_precision.loss_scale, "skipped_steps": self.skipped_steps}
        super().log(logs, *args, **options)

    def _set_up(self, model: nn.Module) -> None:
        """Now the Trainer has made and wrapped the model and the optimizer, and filled them from its checkpoint."""
        held = self.optimizer.optimizer  # of accelerate's AcceleratedOptimizer
        inner: Optimizer = held.inner if isinstance(held, _Stepper) else held
        mp = self.mixed_precision
        if mp is None or mp.model is not model or mp.optimizer is not inner:
            mp = MixedPrecision(model, inner, self.recipe)
        self.mixed_precision = mp
        if self._resume_from is not None:
            saved = torch.load(self._resume_from / STATE_FILE, weights_only=True, map_location=self.args.device)
            live = mp.state_dict()
            mp.load_state_dict({**saved["state"], **{name: live[name] for name in _KEPT_BY_TRAINER}})
            self.skipped_steps = saved["skipped_steps"]
        self.optimizer.optimizer = _Stepper(inner, self._step)
        self._ready = True

    def _backward(self, loss: Tensor, **_: Any) -> None:
        assert self.mixed_precision is not None
        self.mixed_precision.backward(loss)

    def _norm_to_come(self, *_: Any, **__: Any) -> Tensor:
        """What the step will fill in before the Trainer logs it."""
        return self._norm

    def _step(self) -> None:
        assert self.mixed_precision is not None
        step = self.mixed_precision.step(max_grad_norm=self.args.max_grad_norm or None)
        self._norm.fill_(step.grad_norm)
        self.skipped_steps += step.skipped
        self.optimizer._is_overflow = step.skipped  # what accelerator.optimizer_step_was_skipped tells

    def save_state_beside(self, folder: Path) -> None:
        """Write what the Trainer's checkpoint in this folder lacks."""
        assert self.mixed_precision is not None
        state = {key: value for key, value in self.mixed_precision.state_dict().items() if key not in _KEPT_BY_TRAINER}
        partial = folder / f"{STATE_FILE}.partial"
        torch.save({"state": state, "skipped_steps": self.skipped_steps}, partial)
        partial.replace(folder / STATE_FILE)


class _Stepper:
    """Stands where accelerate calls the optimizer: steps by the recipe, and is the optimizer in all else."""

    def __init__(self, inner: Optimizer, step: Any) -> None:
        self.inner, self._step = inner, step

    def step(self, closure: Any = None) -> None:
        self._step()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def __setattr__(self, name: str, value: Any) -> None:
        object.__setattr__(self if name in ("inner", "_step") else self.inner, name, value)


class _SaveState(TrainerCallback):  # type: ignore[misc]
    """Writes the recipe's state into each checkpoint."""

    def __init__(self, trainer: MixedPrecisionTrainer) -> None:
        self._trainer = trainer

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        if args.should_save and not args.save_only_model and folder.is_dir():
            self._trainer.save_state_beside(folder)


def _check(trainer: MixedPrecisionTrainer) -> None:
    args = trainer.args
    for name in ("fp16", "bf16", "fp16_full_eval", "bf16_full_eval"):
        if getattr(args, name, False):
            raise FewbitsError(
                f"TrainingArguments: {name}=True lets accelerate cast too; leave it out, precision="
                f"{trainer.recipe.name!r} says it"
            )
    if trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled:
        engine = "deepspeed" if trainer.is_deepspeed_enabled else "fsdp"
        raise FewbitsError(
            f"TrainingArguments: {engine} shards the optimizer by itself, which a recipe cannot follow; use DDP here, "
            "or fully_shard with fewbits.MixedPrecision in a loop of your own (examples/torchrun_fsdp2.py)"
        )
    if args.n_gpu > 1:
        raise FewbitsError(
            f"TrainingArguments: one process would drive {args.n_gpu} GPUs by nn.DataParallel, which a recipe does not "
            "reach; start a process for each with torchrun"
        )
