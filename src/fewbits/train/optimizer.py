"""Who applies the gradients: fewbits' own AdamW sweep, or the optimizer that the user gave.

Both take gradients that are still scaled, and one factor for all: 1 / loss scale, times what clipping asks for.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from fewbits.train.adamw import Coefficients, Update, adamw
from fewbits.train.matmul import Operands
from fewbits.train.policy import Policy
from fewbits.train.recipe import Recipe, is_eight_bit
from fewbits.train.shards import is_sharded, local, named_for_all, saved_tensor, shard_index
from fewbits.train.storage import Storage


class Updater(Protocol):
    """Applies the gradients of one step."""

    def step(self, gradients: dict[str, Tensor], factor: float) -> None:
        """Update the parameters of these names."""

    def state_dict(self) -> dict[str, Any]:
        """What must survive a restart, besides the optimizer's own state dict."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up where ``state_dict`` was made."""


class TorchStep:
    """The user's optimizer, on unscaled float32 gradients."""

    def __init__(self, optimizer: Optimizer, parameters: dict[str, nn.Parameter], policy: Policy) -> None:
        self._optimizer, self._parameters, self._policy = optimizer, parameters, policy

    @torch.no_grad()
    def step(self, gradients: dict[str, Tensor], factor: float) -> None:
        """Unscale, then let the optimizer step."""
        for name, gradient in gradients.items():
            wide = gradient.float()
            self._parameters[name].grad = wide if factor == 1 else wide.mul_(factor)
        self._optimizer.step()
        for name in gradients:  # some optimizers write through .data, which no version counts
            torch.autograd.graph.increment_version(self._parameters[name])
        self._policy.forget_weights()

    def state_dict(self) -> dict[str, Any]:
        """Nothing: the optimizer has it."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing to load; the weights have changed."""
        self._policy.forget_weights()


class AdamWSweep:
    """A ``torch.optim.AdamW`` whose work the fused sweep does; its ``param_groups`` are read at every step.

    The moments are here, by parameter name, and not in ``optimizer.state``.
    """

    def __init__(
        self, optimizer: Optimizer, parameters: dict[str, nn.Parameter], recipe: Recipe, policy: Policy
    ) -> None:
        self._optimizer, self._recipe, self._policy = optimizer, recipe, policy
        names = {id(param): name for name, param in parameters.items()}
        self._names: list[list[str]] = []  # of each group of the optimizer, whose loading replaces the groups
        self.storages: dict[str, Storage] = {}
        self._sharded = {name: param for name, param in parameters.items() if is_sharded(param)}
        for group in optimizer.param_groups:
            members = [(names[id(param)], param) for param in group["params"] if param.requires_grad]
            for name, param in members:
                self.storages[name] = self._storage(len(self.storages), param, len(parameters))
                self._adopt(self.storages[name], optimizer.state.get(param, {}))
            self._names.append([name for name, _ in members])

    def _storage(self, index: int, param: nn.Parameter, count: int) -> Storage:
        if not is_sharded(param):
            return Storage.of(index, param, self._recipe.master, self._recipe.state)
        rows = nn.Parameter(local(param), requires_grad=False)
        index += shard_index(param)[0] * count  # other random numbers for each shard
        return Storage.of(index, rows, self._recipe.master, self._recipe.state, param.numel())

    @staticmethod
    def _adopt(storage: Storage, state: dict[str, Any]) -> None:
        """Go on from the moments that the optimizer already has."""
        if "exp_avg" in state and "exp_avg_sq" in state:
            storage.keep_moments(local(state["exp_avg"]).float(), local(state["exp_avg_sq"]).float(), 0)
            storage.steps = int(state["step"])

    def step(self, gradients: dict[str, Tensor], factor: float) -> None:
        """One sweep over the parameters that have gradients."""
        for name, param in self._sharded.items():
            self.storages[name].param.data = local(param)  # FSDP may have moved it
        updates = [
            self._update(self.storages[name], group, local(gradients[name]), factor)
            for group, names in zip(self._optimizer.param_groups, self._names, strict=True)
            for name in names
            if name in gradients
        ]
        adamw(updates, self._recipe.seed)
        for update in updates:
            param = update.storage.param
            torch.autograd.graph.increment_version(param)
            operands = self._policy.operands_of(param)
            if operands and update.copy is not None:
                operands.replace_weight(param, update.copy)
        if self._recipe.eight_bit:
            self._policy.forget_weights()
        # Learning-rate schedulers warn unless they see that the optimizer has stepped.
        self._optimizer._opt_called = True  # type: ignore[attr-defined]

    def _update(self, storage: Storage, group: dict[str, Any], gradient: Tensor, factor: float) -> Update:
        storage.steps += 1
        lr, betas = float(group["lr"]), tuple(float(beta) for beta in group["betas"])
        coefficients = Coefficients.of(
            lr, (betas[0], betas[1]), group["eps"], group["weight_decay"], storage.steps, factor
        )
        return Update(storage, gradient, coefficients, _copy_to_write(self._policy.operands_of(storage.param), storage))

    def state_dict(self) -> dict[str, Any]:
        """Steps, moments and the rest of the masters, by parameter name."""
        return {name: {"steps": held.steps, **self._tensors(name)} for name, held in self.storages.items()}

    def _tensors(self, name: str) -> dict[str, Tensor]:
        held, param = self.storages[name].tensors(), self._sharded.get(name)
        return held if param is None else named_for_all(param, held)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Copy them back; the names must be those of the model."""
        for name, held in self.storages.items():
            saved = state[name]
            held.steps = saved["steps"]
            for key, tensor in self._tensors(name).items():
                local(tensor).copy_(local(saved_tensor(saved, name, key)))
        self._policy.forget_weights()


def _copy_to_write(operands: Operands | None, storage: Storage) -> Tensor | None:
    """The low-precision copy that the sweep writes along; None where there is none, or it needs a scale first."""
    if operands is None or is_eight_bit(operands.recipe.weights) or storage.master != "fp32":
        return None
    copy = operands.copy_of(storage.param)
    return copy if copy is not None and copy.dtype in (torch.float16, torch.bfloat16) else None
