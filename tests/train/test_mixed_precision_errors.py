"""Bad input: each refused with the thing, the value and the remedy."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import pytest
import torch
from torch import nn

from fewbits import FewbitsError, MixedPrecision, Recipe
from train.tiny_gpt import batch, tiny_gpt


def prepared(recipe: str | Recipe = "fp16") -> MixedPrecision:
    model = tiny_gpt()
    return MixedPrecision(model, torch.optim.AdamW(model.parameters()), recipe)


def refused(message: str) -> Any:
    return pytest.raises(FewbitsError, match=re.escape(message))


def test_parameters_that_are_not_float32() -> None:
    model = tiny_gpt().half()
    with refused("tokens.weight is torch.float16, but master weights are float32: small updates would be lost; load"):
        MixedPrecision(model, torch.optim.AdamW(model.parameters()), "fp16")


def test_a_model_without_trainable_parameters() -> None:
    model = tiny_gpt().requires_grad_(False)
    with refused("model: no parameter requires a gradient, so nothing can be trained; unfreeze some"):
        MixedPrecision(model, torch.optim.AdamW(model.parameters()), "fp16")


def test_things_that_are_not_a_model_or_an_optimizer() -> None:
    model = tiny_gpt()
    with refused("model: a torch.nn.Module is needed, got str"):
        MixedPrecision("gpt", torch.optim.AdamW(model.parameters()))  # type: ignore[arg-type]
    with refused("optimizer: a torch.optim.Optimizer is needed, got str"):
        MixedPrecision(model, "adamw")  # type: ignore[arg-type]


def test_a_model_on_the_meta_device() -> None:
    with torch.device("meta"):
        model = nn.Linear(4, 4)
    with refused("weight is on the meta device, without values; load the weights first"):
        MixedPrecision(model, torch.optim.AdamW(model.parameters()))


def test_an_optimizer_over_other_parameters() -> None:
    with refused("optimizer: 1 of its 1 parameters are not the model's (the first has shape [3])"):
        MixedPrecision(tiny_gpt(), torch.optim.AdamW([nn.Parameter(torch.ones(3))]))


def test_an_optimizer_that_needs_a_closure() -> None:
    model = tiny_gpt()
    with refused("optimizer: LBFGS needs a closure that computes the loss again"):
        MixedPrecision(model, torch.optim.LBFGS(model.parameters()))


def test_narrow_masters_with_another_optimizer() -> None:
    model = tiny_gpt()
    recipe = dataclasses.replace(Recipe.named("bf16"), master="split")
    with refused("recipe bf16: master='split' and state='fp32' are kept by fewbits' AdamW, not by SGD"):
        MixedPrecision(model, torch.optim.SGD(model.parameters()), recipe)
    with refused("not by AdamW with amsgrad=True; give a plain torch.optim.AdamW"):
        MixedPrecision(model, torch.optim.AdamW(model.parameters(), amsgrad=True), recipe)


def test_a_keep_pattern_that_names_nothing() -> None:
    recipe = dataclasses.replace(Recipe.named("fp16"), keep=("lm_head",))
    with refused("recipe fp16: keep pattern 'lm_head' matches none of the model's 9 linear layers, such as head"):
        prepared(recipe)


def test_an_unknown_recipe() -> None:
    with refused("recipe 'fp61' is unknown; did you mean fp16?"):
        prepared("fp61")


def test_step_before_backward() -> None:
    with refused("step() before backward(): there is nothing to apply"):
        prepared().step()


def test_backward_outside_forward() -> None:
    mp = prepared()
    with refused("backward() before forward(): compute the loss inside `with mp.forward():`"):
        mp.backward(mp.model(batch(0)))


def test_forward_inside_forward() -> None:
    mp = prepared()
    with mp.forward(), refused("forward() is entered twice"), mp.forward():
        pass


def test_losses_that_are_none() -> None:
    mp = prepared()
    with mp.forward():
        loss = mp.model(batch(0))
    with refused("loss: a tensor is needed, got float"):
        mp.backward(3.0)  # type: ignore[arg-type]
    with refused("loss: one number is needed, got shape [2]; take its mean first"):
        mp.backward(torch.stack([loss, loss]))
    with refused("loss: it requires no gradient; compute it from the model"):
        mp.backward(loss.detach())


def test_no_parameter_with_a_gradient() -> None:
    mp = prepared()
    elsewhere = torch.ones(3, requires_grad=True)
    with mp.forward():
        mp.backward(elsewhere.sum())
    with refused("step: no parameter of the optimizer has a gradient; the loss does not depend on them"):
        mp.step()


def test_sparse_gradients() -> None:
    model = nn.Embedding(10, 4, sparse=True)
    mp = MixedPrecision(model, torch.optim.SGD(model.parameters()))
    with mp.forward():
        mp.backward(model(torch.tensor([1])).sum())
    with refused("weight: its gradient is sparse; make the embedding with sparse=False"):
        mp.step()


@pytest.mark.parametrize("norm", [0.0, -1.0, float("nan")])
def test_a_norm_that_is_not_positive(norm: float) -> None:
    mp = prepared()
    with mp.forward():
        mp.backward(mp.model(batch(0)))
    with refused(f"max_grad_norm={norm!r}: a positive number is needed, or None"):
        mp.step(max_grad_norm=norm)


def test_state_dicts_of_others() -> None:
    mp, other = prepared("fp16"), prepared("bf16")
    with refused("state dict: made with name='bf16', but this recipe has name='fp16'; resume with the same recipe"):
        mp.load_state_dict(other.state_dict())
    with refused("state dict: not one that MixedPrecision.state_dict()"):
        mp.load_state_dict(mp.model.state_dict())


def test_a_state_dict_of_another_model_or_optimizer_changes_nothing() -> None:
    mp, model = prepared(), nn.Linear(8, 8)
    other = MixedPrecision(model, torch.optim.AdamW(model.parameters()), "fp16")
    before = {name: value.clone() for name, value in mp.model.state_dict().items()}
    with refused("state dict: tokens.weight has shape none there and [67, 64] in this model; load it into a model of"):
        mp.load_state_dict(other.state_dict())
    with refused("state dict: weight has shape none there and [8, 8] in this model"):
        other.load_state_dict(mp.state_dict())
    model = tiny_gpt()
    some = MixedPrecision(model, torch.optim.AdamW([model.head.weight]), "fp16")
    with refused("state dict: its optimizer has groups of [1] parameters, and this one of ["):
        mp.load_state_dict(some.state_dict())
    state = mp.state_dict()
    del state["masters"]
    with refused("state dict: not one that MixedPrecision.state_dict()"):
        mp.load_state_dict(state)
    assert all(torch.equal(value, before[name]) for name, value in mp.model.state_dict().items())


def backward(mp: MixedPrecision) -> None:
    with mp.forward():
        loss = mp.model(batch(0)).float().mean()
    mp.backward(loss)


@pytest.mark.parametrize("recipe", ["fp32", "fp16", "bf16", "fp8"])
def test_parameters_converted_afterwards(recipe: str) -> None:
    mp = prepared(recipe)
    mp.model.half()
    backward(mp)
    with refused("tokens.weight is torch.float16 now, but was torch.float32 when MixedPrecision was made: masters are"):
        mp.step()


def test_groups_added_afterwards() -> None:
    model = tiny_gpt()
    mp = MixedPrecision(model, torch.optim.AdamW([model.head.weight]), "fp16")
    mp.optimizer.add_param_group({"params": [model.places.weight]})
    backward(mp)
    with refused("optimizer: it has 2 parameter groups, but had 1 when MixedPrecision was made; add groups before"):
        mp.step()


def test_parameters_unfrozen_afterwards() -> None:
    model = tiny_gpt()
    model.places.weight.requires_grad_(False)
    mp = MixedPrecision(model, torch.optim.AdamW(model.parameters()), "fp16")
    model.places.weight.requires_grad_(True)
    backward(mp)
    with refused(
        "places.weight was frozen when MixedPrecision was made and is not now; make a new one after unfreezing"
    ):
        mp.step()


@pytest.mark.parametrize("lr", [float("nan"), float("inf")])
@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.SGD])
def test_a_learning_rate_that_is_not_finite(lr: float, kind: Any) -> None:
    model = tiny_gpt()
    mp = MixedPrecision(model, kind(model.parameters(), lr=1e-3), "fp16")
    mp.optimizer.param_groups[0]["lr"] = lr
    backward(mp)
    with refused(f"optimizer: lr={lr} would make every weight not finite; look at the schedule"):
        mp.step()
    assert all(bool(param.isfinite().all()) for param in model.parameters())


def test_a_state_dict_between_backward_and_step() -> None:
    mp = prepared()
    with mp.forward():
        mp.backward(mp.model(batch(0)))
    with refused("state_dict() between backward() and step(): gradients would be lost; call step first"):
        mp.state_dict()
