"""What a user gives to MixedPrecision, checked: model, optimizer, loss, gradients, state dict."""

from __future__ import annotations

import inspect
import math
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from fewbits.errors import FewbitsError
from fewbits.train.recipe import Recipe


def check_model(model: nn.Module) -> dict[str, nn.Parameter]:
    """The names and parameters of a model, tied ones once.

    Raises:
        FewbitsError: Not a module, without parameters, all frozen, on the meta device, or a trained one not float32.
    """
    if not isinstance(model, nn.Module):
        raise FewbitsError(f"model: a torch.nn.Module is needed, got {type(model).__name__}")
    parameters = dict(model.named_parameters())
    trained = {name: param for name, param in parameters.items() if param.requires_grad}
    if not trained:
        raise FewbitsError("model: no parameter requires a gradient, so nothing can be trained; unfreeze some")
    for name, param in trained.items():
        if param.device.type == "meta":
            raise FewbitsError(f"{name} is on the meta device, without values; load the weights first")
        if param.dtype != torch.float32:
            raise FewbitsError(
                f"{name} is {param.dtype}, but master weights are float32: small updates would be lost; "
                "load the model in float32, or call model.float() before the optimizer is made"
            )
    return parameters


def check_optimizer(optimizer: Optimizer, parameters: dict[str, nn.Parameter]) -> None:
    """See that an optimizer steps without a closure, on parameters of the model only.

    Raises:
        FewbitsError: If not.
    """
    if not isinstance(optimizer, Optimizer):
        raise FewbitsError(f"optimizer: a torch.optim.Optimizer is needed, got {type(optimizer).__name__}")
    closure = inspect.signature(type(optimizer).step).parameters.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty:
        raise FewbitsError(
            f"optimizer: {type(optimizer).__name__} needs a closure that computes the loss again, which loss scaling "
            "cannot give it; take one that steps once, such as torch.optim.AdamW"
        )
    known = {id(param) for param in parameters.values()}
    held = [param for group in optimizer.param_groups for param in group["params"]]
    strangers = [param for param in held if id(param) not in known]
    if strangers:
        raise FewbitsError(
            f"optimizer: {len(strangers)} of its {len(held)} parameters are not the model's (the first has shape "
            f"{list(strangers[0].shape)}); make it from model.parameters(), after the model was moved or converted"
        )


def can_sweep(optimizer: Optimizer, recipe: Recipe) -> bool:
    """Whether the fused sweep can do what this optimizer does.

    Raises:
        FewbitsError: If not, but the recipe's masters or states need it.
    """
    odd = [
        name
        for group in optimizer.param_groups
        for name in ("amsgrad", "maximize", "capturable", "differentiable")
        if group.get(name)
    ]
    narrow = recipe.master != "fp32" or recipe.state != "fp32"
    if type(optimizer) is AdamW and not odd:
        devices = {param.device.type for group in optimizer.param_groups for param in group["params"]}
        return narrow or devices == {"cpu"}
    if narrow:
        what = f"{type(optimizer).__name__} with {odd[0]}=True" if odd else type(optimizer).__name__
        raise FewbitsError(
            f"recipe {recipe.name}: master={recipe.master!r} and state={recipe.state!r} are kept by fewbits' AdamW, "
            f"not by {what}; give a plain torch.optim.AdamW, or take master='fp32' and state='fp32'"
        )
    return False


def kept_names(recipe: Recipe, names: list[str]) -> set[str]:
    """Which linear layers a recipe's ``keep`` patterns name.

    Raises:
        FewbitsError: A pattern names none.
    """
    kept: set[str] = set()
    for pattern in recipe.keep:
        found = {name for name in names if fnmatchcase(name, pattern)}
        if not found:
            example = f", such as {names[-1]}" if names else ""
            raise FewbitsError(
                f"recipe {recipe.name}: keep pattern {pattern!r} matches none of the model's {len(names)} linear "
                f"layers{example}"
            )
        kept |= found
    return kept


def check_loss(loss: Tensor) -> None:
    """See that a loss is one number with a graph behind it.

    Raises:
        FewbitsError: If not.
    """
    if not isinstance(loss, Tensor):
        raise FewbitsError(f"loss: a tensor is needed, got {type(loss).__name__}; give the result of the model's loss")
    if loss.numel() != 1:
        raise FewbitsError(f"loss: one number is needed, got shape {list(loss.shape)}; take its mean first")
    if not loss.requires_grad:
        raise FewbitsError(
            "loss: it requires no gradient; compute it from the model inside `with mp.forward():`, not under no_grad"
        )


@dataclass(frozen=True)
class Known:
    """What training was set up with.

    Attributes:
        groups: How many parameter groups the optimizer had.
        dtypes: Of the parameters, by name, as they are kept.
        frozen: The names of those without gradient.
    """

    groups: int
    dtypes: dict[str, torch.dtype]
    frozen: frozenset[str]

    @classmethod
    def of(cls, optimizer: Optimizer, parameters: dict[str, nn.Parameter]) -> Known:
        """Note it, when masters are what they will be."""
        frozen = frozenset(name for name, param in parameters.items() if not param.requires_grad)
        return cls(len(optimizer.param_groups), {name: param.dtype for name, param in parameters.items()}, frozen)


def check_unchanged(optimizer: Optimizer, parameters: dict[str, nn.Parameter], known: Known) -> None:
    """See that parameters and groups are those that training was set up with, and that rates are finite.

    Raises:
        FewbitsError: If not.
    """
    groups = len(optimizer.param_groups)
    if groups != known.groups:
        raise FewbitsError(
            f"optimizer: it has {groups} parameter groups, but had {known.groups} when MixedPrecision was made; add "
            "groups before that, or make a new one"
        )
    for name, param in parameters.items():
        if param.dtype != known.dtypes[name]:
            raise FewbitsError(
                f"{name} is {param.dtype} now, but was {known.dtypes[name]} when MixedPrecision was made: masters are "
                "not converted in between; leave out model.half(), model.bfloat16() and model.to(dtype)"
            )
        if param.requires_grad and name in known.frozen:
            raise FewbitsError(
                f"{name} was frozen when MixedPrecision was made and is not now; make a new one after unfreezing, or "
                "begin with it unfrozen and lr=0"
            )
    for group in optimizer.param_groups:
        if not math.isfinite(float(group.get("lr", 0.0))):
            raise FewbitsError(
                f"optimizer: lr={float(group['lr'])} would make every weight not finite; look at the schedule"
            )


def check_gradients(gradients: dict[str, Tensor]) -> None:
    """See that there are gradients, and dense ones.

    Raises:
        FewbitsError: If not.
    """
    if not gradients:
        raise FewbitsError(
            "step: no parameter of the optimizer has a gradient; the loss does not depend on them, or the model was "
            "moved or converted after the optimizer was made"
        )
    for name, gradient in gradients.items():
        if gradient.layout != torch.strided:
            raise FewbitsError(f"{name}: its gradient is sparse; make the embedding with sparse=False")


_PARTS = {"version", "recipe", "model", "optimizer", "masters", "loss_scale", "history"}


def check_state(state: Any, recipe: Recipe, model: nn.Module, optimizer: Optimizer) -> None:
    """See that a state dict is one of MixedPrecision, of the same recipe, model and parameter groups.

    Raises:
        FewbitsError: If not.
    """
    if not isinstance(state, dict) or state.get("version") != 1 or _PARTS - set(state):
        raise FewbitsError("state dict: not one that MixedPrecision.state_dict() of this version of fewbits has made")
    saved, ours = state["recipe"], recipe.to_json()
    differing = [name for name in ours if saved.get(name) != ours[name]]
    if differing:
        name = differing[0]
        raise FewbitsError(
            f"state dict: made with {name}={saved.get(name)!r}, but this recipe has {name}={ours[name]!r}; resume with "
            "the same recipe"
        )
    shapes = {name: list(value.shape) for name, value in model.state_dict().items() if isinstance(value, Tensor)}
    theirs = {name: list(value.shape) for name, value in state["model"].items() if isinstance(value, Tensor)}
    for name in [*shapes, *theirs]:
        if shapes.get(name) != theirs.get(name):
            raise FewbitsError(
                f"state dict: {name} has shape {theirs.get(name, 'none')} there and {shapes.get(name, 'none')} in this "
                "model; load it into a model of the same kind"
            )
    sizes, others = (
        [len(group["params"]) for group in groups]
        for groups in (optimizer.param_groups, state["optimizer"]["param_groups"])
    )
    if sizes != others:
        raise FewbitsError(
            f"state dict: its optimizer has groups of {others} parameters, and this one of {sizes}; make the optimizer "
            "in the same way"
        )
