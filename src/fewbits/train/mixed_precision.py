"""Mixed-precision training in three lines.

    mp = MixedPrecision(model, optimizer, "fp16")
    with mp.forward():
        loss = model(**batch).loss          1  a low-precision copy of the FP32 weights runs forward; the loss is FP32
    mp.backward(loss)                       2  low-precision gradients, of the scaled loss
    step = mp.step(max_grad_norm=1.0)       3  read once, unscaled, clipped, applied to the FP32 weights

Several forward and backward passes before a step add their gradients up in FP32; divide the loss by their number.

On several processes give the model as PyTorch's engine made it, the DDP module or one that ``fully_shard`` was called
on, and an optimizer made after that. Processes skip a step together, clip by the norm of all gradients and have one
loss scale; gradients are added up between them in FP32 (for ``fully_shard``: leave ``mp_policy`` out).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import _engine_run_backward
from torch.optim import Optimizer

from fewbits.errors import FewbitsError
from fewbits.train.arguments import (
    Known,
    can_sweep,
    check_gradients,
    check_loss,
    check_model,
    check_optimizer,
    check_state,
    check_unchanged,
    kept_names,
)
from fewbits.train.gradients import Culprit, Reading, added_up, gradient_stats, reading_of
from fewbits.train.lint import lint
from fewbits.train.loss_scale import LossScale
from fewbits.train.optimizer import AdamWSweep, TorchStep, Updater
from fewbits.train.policy import Policy, linear_weights
from fewbits.train.ranks import Ranks, unwrapped
from fewbits.train.recipe import Recipe
from fewbits.train.shards import local


@dataclass(frozen=True)
class Step:
    """What a step did.

    Attributes:
        skipped: Whether the weights, the moments and the step counts stayed as they were, because a gradient or the
            loss was not finite. Advance a learning-rate scheduler only if not.
        loss_scale: The scale that the gradients of this step had.
        grad_norm: The norm of all unscaled gradients before clipping; not finite if skipped.
        culprits: The tensors that were not finite, with counts.
    """

    skipped: bool
    loss_scale: float
    grad_norm: float
    culprits: tuple[Culprit, ...]


class MixedPrecision:
    """Trains a float32 model in a lower precision.

    The parameters stay what they are, the float32 masters; a recipe may keep them in bfloat16 instead. Gradients are
    cleared by ``step``.

    Args:
        model: Its trained parameters are float32. Frozen ones may have any dtype. Plain, DDP, or fully sharded.
        optimizer: Over parameters of the model. A ``torch.optim.AdamW`` on the CPU is done by one fused sweep, and so
            is any AdamW whose masters or states are not fp32; its ``param_groups`` are obeyed, its ``state`` stays
            empty and its step hooks are not called. Any other optimizer that needs no closure steps by itself.
        recipe: fp32, fp16, bf16, fp8, or a ``Recipe``.

    Raises:
        FewbitsError: A parameter in another dtype, nothing to train, an optimizer over other parameters or one that
            needs a closure, a recipe that the optimizer or the way of sharding cannot follow, a keep pattern that
            names nothing.
    """

    def __init__(self, model: nn.Module, optimizer: Optimizer, recipe: str | Recipe = "bf16") -> None:
        self.recipe = Recipe.named(recipe)
        self.model, self.optimizer = model, optimizer
        self._bare = unwrapped(model)  # names and state dicts are the same on one process and on many
        parameters = check_model(self._bare)
        check_optimizer(optimizer, parameters)
        sweeps = can_sweep(optimizer, self.recipe)
        lint(self.recipe, model, optimizer)
        weights = linear_weights(self._bare)
        kept = kept_names(self.recipe, list(weights))
        self.policy = Policy(self.recipe, {id(weight): (name, name in kept) for name, weight in weights.items()})
        self.policy.take_over_loss(self._bare)
        held = {id(param) for group in optimizer.param_groups for param in group["params"]}
        self._parameters = {name: param for name, param in parameters.items() if id(param) in held}
        self._others = [param for param in parameters.values() if id(param) not in held]
        self._ranks = Ranks(model, self._parameters, self.recipe, weights)
        if self._ranks.sharded:
            self.policy.follow(self._bare)
        self._updater: Updater = (
            AdamWSweep(optimizer, parameters, self.recipe, self.policy)
            if sweeps
            else TorchStep(optimizer, parameters, self.policy)
        )
        self._known = Known.of(optimizer, self._parameters)
        self._let_gradients_be_narrow()
        self._scale = LossScale(self.recipe.loss_scaling, float(self.recipe.results.max))
        self._forwards = self._backwards = 0
        self._bad_losses: list[Culprit] = []

    def _let_gradients_be_narrow(self) -> None:
        """Gradients are kept as the matmuls give them: half the memory. Not where other processes add to them."""
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            return
        for param in self._parameters.values():
            if self.policy.operands_of(param) is not None or param.dtype != torch.float32:
                param.grad_dtype = None

    @property
    def loss_scale(self) -> float:
        """What the next loss is multiplied by."""
        return self._scale.scale

    @contextmanager
    def forward(self) -> Iterator[None]:
        """Run the model by the recipe inside this context.

        Raises:
            FewbitsError: It is already entered.
        """
        if self.policy.active:
            raise FewbitsError("forward() is entered twice; leave the first `with mp.forward():` before the next")
        self._forwards += 1
        with self.policy.entered():
            yield

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Run the model by the recipe inside this context, to look at its loss: it leaves no trace in the training."""
        with self.policy.entered(), self.policy.history.untouched():
            yield

    def backward(self, loss: Tensor) -> None:
        """Compute the gradients of the loss times the loss scale, and add them to what is there since the last step.

        A loss that is not finite makes the step be skipped.

        Raises:
            FewbitsError: The loss is not one number with a graph, or was not computed inside ``forward``.
        """
        check_loss(loss)
        if not self._forwards:
            raise FewbitsError("backward() before forward(): compute the loss inside `with mp.forward():`")
        value = float(loss.detach())
        if value != value or value in (float("inf"), float("-inf")):
            self._bad_losses.append(Culprit("loss", int(value == value), int(value != value)))
        self._backwards += 1
        with added_up(self._parameters.values()):
            self._run_backward(loss.float() * self._scale.scale)

    def _run_backward(self, scaled: Tensor) -> None:
        """``scaled.backward()`` with the policy on: checkpointed activations are computed again by it.

        ``Tensor.backward`` turns modes off before it starts, so its engine is called here.
        """
        one = torch.ones_like(scaled)
        with self.policy.entered():
            _engine_run_backward((scaled,), (one,), False, False, (), allow_unreachable=True, accumulate_grad=True)

    def step(self, max_grad_norm: float | None = None) -> Step:
        """Apply the gradients, unless any is not finite, and clear them.

        Args:
            max_grad_norm: The gradients are scaled down to this norm if theirs is larger; None: as they are.

        Raises:
            FewbitsError: Without a backward pass, without any gradient, with sparse ones, a norm that is not positive,
                a learning rate that is not finite, parameters converted or unfrozen or grouped otherwise since.
        """
        if not self._backwards:
            raise FewbitsError("step() before backward(): there is nothing to apply; call mp.backward(loss) first")
        if max_grad_norm is not None and not max_grad_norm > 0:
            raise FewbitsError(f"max_grad_norm={max_grad_norm!r}: a positive number is needed, or None")
        check_unchanged(self.optimizer, self._parameters, self._known)
        gradients = {name: param.grad for name, param in self._parameters.items() if param.grad is not None}
        check_gradients(gradients)
        reading, bad_losses = self._read(gradients)
        scale, norm = self._scale.scale, reading.norm / self._scale.scale
        culprits = (*bad_losses, *reading.culprits)
        if not culprits:
            clip = 1.0 if max_grad_norm is None else min(1.0, max_grad_norm / (norm + 1e-6))
            self._updater.step(gradients, clip / scale)
        if not bad_losses:  # a loss that is not finite says nothing about the scale of its gradients
            self._scale.update(reading.amax, reading.infinite, reading.nan)
        self.policy.history.end_step(keep=not culprits, largest=None if self._ranks.alone else self._ranks.largest)
        self._clear()
        return Step(bool(culprits), scale, norm, culprits)

    def _read(self, gradients: dict[str, Tensor]) -> tuple[Reading, tuple[Culprit, ...]]:
        """What the gradients, and the losses that were not finite, tell; the same on all processes."""
        stats = gradient_stats([local(gradient) for gradient in gradients.values()])
        if self._ranks.alone:
            return reading_of(list(gradients), stats), tuple(self._bad_losses)
        return self._ranks.agree(list(gradients), stats, self._bad_losses)

    def _clear(self) -> None:
        for param in (*self._parameters.values(), *self._others):
            param.grad = None
        self._forwards = self._backwards = 0
        self._bad_losses = []

    def state_dict(self) -> dict[str, Any]:
        """All that a run needs to go on with the same bits: weights, masters, moments, scale, histories, counts.

        Call it between steps. Tensors are the live ones, as in PyTorch: save them before the next step.

        Raises:
            FewbitsError: Gradients wait for a step.
        """
        if self._backwards:
            raise FewbitsError("state_dict() between backward() and step(): gradients would be lost; call step first")
        return {
            "version": 1,
            "recipe": self.recipe.to_json(),
            "model": self._bare.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "masters": self._updater.state_dict(),
            "loss_scale": self._scale.state_dict(),
            "history": self.policy.history.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up where ``state_dict`` was made: same model, same optimizer, same recipe.

        Raises:
            FewbitsError: Another recipe, model or optimizer, or not such a state dict; nothing is loaded.
        """
        check_state(state, self.recipe, self._bare, self.optimizer)
        self._bare.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self._updater.load_state_dict(state["masters"])
        self._scale.load_state_dict(state["loss_scale"])
        self.policy.history.load_state_dict(state["history"])
        self._clear()
