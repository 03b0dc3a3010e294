"""Adapters (LoRA) trained on top of frozen layers in few bits."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from tiny_families import FAMILIES, agree

from fewbits.models.linear import QuantLinear

pytestmark = pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"
)  # asked by peft

Saved = Callable[..., Path]
IDS = torch.arange(3, 35).view(1, 32)
PRECISIONS = pytest.mark.parametrize("precision", ["int8", "int8-weight", "int4", "fp8"])
EPS = torch.finfo(torch.float32).eps


def with_adapter(model: Any, targets: Any = ("q_proj", "v_proj")) -> Any:
    """The model with LoRA of rank 4; both matrices are random, so that both get gradients."""
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=targets, task_type="CAUSAL_LM", lora_dropout=0.0)
    adapted = peft.get_peft_model(model, config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.05 * torch.randn(parameter.shape, generator=generator))
    return adapted


def load(saved: Saved, name: str = "llama", precision: str = "int8") -> Any:
    return FAMILIES[name].ours.from_pretrained(saved(name), precision=precision)


def gradients(model: Any) -> dict[str, torch.Tensor]:
    """Of the loss on the tokens, for every parameter that takes one."""
    model(IDS, labels=IDS).loss.backward()
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


@PRECISIONS
def test_only_the_adapter_is_trained(saved: Saved, precision: str) -> None:
    model = with_adapter(load(saved, precision=precision))
    found = gradients(model)
    assert len(found) == 2 * 2 * 2
    assert all("lora_" in name for name in found)
    assert all(gradient.isfinite().all() and gradient.norm() > 0 for gradient in found.values())


@PRECISIONS
def test_one_layer_gets_the_gradients_of_its_dequantized_self(saved: Saved, precision: str) -> None:
    layer = load(saved, "qwen2", precision).model.layers[0].self_attn.q_proj
    plain = torch.nn.Linear(64, 64)
    plain.weight.data, plain.bias.data = layer.quantized_weight().dequantize(), layer.bias.detach().clone()
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(1))
    upstream = torch.randn(5, 64, generator=torch.Generator().manual_seed(2))
    got, expected = (
        torch.autograd.grad(module(leaf), leaf, upstream)[0]
        for module in (layer, plain)
        for leaf in [x.clone().requires_grad_()]
    )
    # Sums of 64 products, in another order.
    bound = 64 * EPS * (upstream.abs() @ plain.weight.detach().abs())
    assert ((got - expected).abs() <= bound).all()
    assert layer.weight.grad is None


def test_the_gradients_are_those_of_the_float_model(saved: Saved) -> None:
    plain = load(saved, precision="fp32")
    expected = gradients(with_adapter(plain))
    for precision, bound in {"int8": 0.1, "int8-weight": 0.05}.items():
        found = gradients(with_adapter(load(saved, precision=precision)))
        for name, gradient in found.items():
            assert (gradient - expected[name]).norm() < bound * expected[name].norm(), (name, precision)


@PRECISIONS
@pytest.mark.parametrize("name", ["llama", "mixtral", "gemma3"])
def test_training_lowers_the_loss_and_leaves_the_base_alone(saved: Saved, name: str, precision: str) -> None:
    model = with_adapter(load(saved, name, precision))
    before = {key: tensor.clone() for key, tensor in model.state_dict().items() if "lora_" not in key}
    optimizer = torch.optim.SGD([each for each in model.parameters() if each.requires_grad], lr=0.1)
    losses = []
    for _ in range(3):
        loss = model(IDS, labels=IDS).loss
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < losses[0]
    after = model.state_dict()
    assert all(torch.equal(tensor, after[key]) for key, tensor in before.items())


def test_every_linear_layer_can_have_an_adapter(saved: Saved) -> None:
    model = with_adapter(load(saved), "all-linear")
    adapted = {name for name, module in model.named_modules() if hasattr(module, "lora_A")}
    assert len(adapted) == 14
    assert all(isinstance(model.get_submodule(name).base_layer, QuantLinear) for name in adapted)
    gradients(model)


def test_an_adapter_is_saved_and_loaded(saved: Saved, tmp_path: Path) -> None:
    model = with_adapter(load(saved)).eval()
    model.save_pretrained(tmp_path)
    assert not any("base_layer" in file.name for file in tmp_path.iterdir())
    again = peft.PeftModel.from_pretrained(load(saved), tmp_path).eval()
    with torch.no_grad():
        expected = model(IDS).logits
        assert torch.equal(again(IDS).logits, expected)
        with model.disable_adapter():
            assert agree(model(IDS).logits, load(saved)(IDS).logits)
        assert torch.equal(model.generate(IDS, max_new_tokens=4), again.generate(IDS, max_new_tokens=4))


def test_through_transformers_own_door(saved: Saved) -> None:
    model = load(saved)
    model.add_adapter(peft.LoraConfig(r=4, target_modules=["q_proj"]))
    assert all("lora_" in name for name, parameter in model.named_parameters() if parameter.requires_grad)
    model(IDS, labels=IDS).loss.backward()


def test_gradient_checkpointing(saved: Saved) -> None:
    model = with_adapter(load(saved)).train()
    expected = gradients(model)
    expected = {name: gradient.clone() for name, gradient in expected.items()}
    model.zero_grad()
    model.activation_checkpointing_enable()
    model.enable_input_require_grads()
    found = gradients(model)
    assert all(torch.allclose(found[name], gradient, rtol=1e-4, atol=1e-6) for name, gradient in expected.items())


@PRECISIONS
def test_merging_into_codes_fails_and_changes_none(saved: Saved, precision: str) -> None:
    model = with_adapter(load(saved, precision=precision))
    layer = model.base_model.model.model.layers[0].self_attn.q_proj.base_layer
    before = layer.quantized_weight().dequantize()
    with pytest.raises(RuntimeError):
        model.merge_and_unload()
    assert torch.equal(layer.quantized_weight().dequantize(), before)
