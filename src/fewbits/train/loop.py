"""A run's moving parts: model, optimizer, text and schedule, step by step; its whole state as one dictionary."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fewbits.errors import FewbitsError
from fewbits.models.filling import Progress
from fewbits.models.source import open_source
from fewbits.train.batches import Windows
from fewbits.train.mixed_precision import MixedPrecision
from fewbits.train.prepare import check_length, prepared_model, prepared_optimizer
from fewbits.train.schedule import learning_rate
from fewbits.train.settings import Settings

SKIPS_IN_A_ROW = 32  # the loss scale goes from its cap to its floor in fewer


@dataclass(frozen=True)
class StepReport:
    """What one step did.

    Attributes:
        step: Its number, from 1.
        loss: Mean of its windows, nats per token.
        lr: The learning rate it took.
        skipped: Whether nothing was applied, since a gradient or the loss was not finite.
        loss_scale: The scale of its gradients.
        grad_norm: Of all gradients, before clipping.
        seconds: Its wall time.
        tokens: That it read.
    """

    step: int
    loss: float
    lr: float
    skipped: bool
    loss_scale: float
    grad_norm: float
    seconds: float
    tokens: int


class Loop:
    """One run; ``step`` by ``step``.

    Args:
        settings: What is asked for.
        progress: Called while the model is loaded, with bytes read and bytes in all.

    Attributes:
        reports: What each step did, those before a checkpoint included.
        steps_here: How many of them this process took.
        gradient_bytes: That the gradients of the last step had.
        copy_bytes: That the low-precision copies of the weights had then.

    Raises:
        FewbitsError: The model or the text cannot be used.
    """

    def __init__(self, settings: Settings, progress: Progress | None = None) -> None:
        self.settings = settings
        self.source = open_source(settings.model)
        check_length(self.source, settings.length)
        self.windows = Windows.of(self.source.tokenizer(), Path(settings.text), settings.length, settings.seed)
        torch.manual_seed(settings.seed)
        self.model = prepared_model(settings, progress)
        self.optimizer = prepared_optimizer(self.model, settings.peak_lr)
        self.mp = MixedPrecision(self.model, self.optimizer, settings.recipe())
        self.reports: list[StepReport] = []
        self.gradient_bytes = self.copy_bytes = self.steps_here = 0
        self._applied = self._skips = 0

    @property
    def steps_done(self) -> int:
        """Steps so far, skipped ones included."""
        return len(self.reports)

    def step(self) -> StepReport:
        """Take the next step.

        Raises:
            FewbitsError: Too many in a row were skipped: the run cannot go on.
        """
        begun = time.perf_counter()
        settings = self.settings
        lr = learning_rate(settings.peak_lr, settings.steps, self._applied)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        loss = sum(self._micro_batch(number) for number in range(settings.accumulate))
        self.gradient_bytes = sum(param.grad.nbytes for param in self.model.parameters() if param.grad is not None)
        self.copy_bytes = self.mp.policy.copy_bytes()
        done = self.mp.step(max_grad_norm=1.0)
        self._applied += not done.skipped
        self._skips = self._skips + 1 if done.skipped else 0
        seconds = time.perf_counter() - begun
        tokens = settings.accumulate * settings.batch * settings.length
        number = self.steps_done + 1
        report = StepReport(number, loss, lr, done.skipped, done.loss_scale, done.grad_norm, seconds, tokens)
        if self._skips >= SKIPS_IN_A_ROW:
            first = done.culprits[0]
            raise FewbitsError(
                f"steps {number - self._skips + 1} to {number} were all skipped, at last since {first.name} has "
                f"{first.infinite} Inf and {first.nan} NaN; give --precision bf16, or a lower --lr"
            )
        self.reports.append(report)
        self.steps_here += 1
        return report

    def _micro_batch(self, number: int) -> float:
        """Forward and backward of one batch; its part of the loss."""
        settings = self.settings
        position = (self.steps_done * settings.accumulate + number) * settings.batch
        ids = self.windows.take(position, settings.batch)
        with self.mp.forward():
            loss = self.model(input_ids=ids, labels=ids, use_cache=False).loss / settings.accumulate
        self.mp.backward(loss)
        return float(loss.detach())

    def state_dict(self) -> dict[str, Any]:
        """All that the run needs to go on with the same bits. The frozen base of adapters is left out."""
        mixed = self.mp.state_dict()
        mixed["model"] = {name: value for name, value in mixed["model"].items() if name not in self._frozen()}
        return {
            "settings": self.settings.to_json(),
            "text": self.windows.fingerprint(),
            "mixed_precision": mixed,
            "reports": [vars(report) for report in self.reports],
            "applied": self._applied,
            "skips": self._skips,
            "random": torch.get_rng_state(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where ``state_dict`` was made.

        Raises:
            FewbitsError: Of another run: other settings, or another text.
        """
        self.settings.check_same(state["settings"])
        if state["text"] != self.windows.fingerprint():
            raise FewbitsError(
                f"--resume: the text {self.settings.text} is not the one that the checkpoint was made with; give that, "
                "or --overwrite without --resume to begin anew"
            )
        mixed = state["mixed_precision"]
        frozen = {name: value for name, value in self.model.state_dict().items() if name in self._frozen()}
        self.mp.load_state_dict({**mixed, "model": {**frozen, **mixed["model"]}})
        self.reports = [StepReport(**report) for report in state["reports"]]
        self._applied, self._skips = state["applied"], state["skips"]
        torch.set_rng_state(state["random"])

    def _frozen(self) -> set[str]:
        """Tensors that stay what they are: all but the adapters."""
        if self.settings.lora is None:
            return set()
        trained = {name for name, param in self.model.named_parameters() if param.requires_grad}
        return set(self.model.state_dict()) - trained
