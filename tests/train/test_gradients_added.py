"""Gradients of several backward passes add up in float32."""

import pytest
import torch
from torch import nn

from fewbits import MixedPrecision
from fewbits.train.gradients import add_wide


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("size", [0, 1, 2**18, 2**19 + 5])
def test_sums_are_those_of_float32(dtype: torch.dtype, size: int) -> None:
    generator = torch.Generator().manual_seed(size)
    total, more = torch.randn(size, generator=generator), torch.randn(size, generator=generator).to(dtype)
    expected = total + more.float()
    add_wide(total, more)
    assert torch.equal(total, expected)


def test_transposed_gradients() -> None:
    total, more = torch.zeros(3, 5), torch.arange(15.0).view(5, 3).t().bfloat16()
    add_wide(total, more)
    assert torch.equal(total, more.float())


def test_a_parameter_that_only_the_first_pass_uses_keeps_its_gradient() -> None:
    model = nn.ModuleDict({"both": nn.Linear(8, 8), "once": nn.Linear(8, 8)})
    mp = MixedPrecision(model, torch.optim.AdamW(model.parameters()), "bf16")
    x = torch.ones(2, 8)
    with mp.forward():
        loss = model["once"](model["both"](x)).square().mean()
    mp.backward(loss)
    once, both = (model[name].weight.grad.float() for name in ("once", "both"))
    with mp.forward():
        loss = model["both"](x).square().mean()
    mp.backward(loss)
    assert torch.equal(model["once"].weight.grad, once)
    assert model["both"].weight.grad.dtype == torch.float32
    assert not torch.equal(model["both"].weight.grad, both)
