"""Outliers kept apart: the layer beside its definition, and models with planted outliers."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import kl_div, linear

import fewbits
from fewbits.errors import FewbitsError
from fewbits.models.linear import QuantLinear
from fewbits.models.outliers import OutlierLinear, keep_outliers_apart
from fewbits.tensors.quantized import quantize_per_channel

THRESHOLD = 6.0


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def layers(N: int, K: int) -> tuple[QuantLinear, QuantLinear, torch.Tensor]:
    """The same layer plain and with outliers apart, and its weight as numbers."""
    weight, bias = quantize_per_channel(random(N, K, seed=1)), random(N, seed=2)
    apart = QuantLinear(weight, bias)
    keep_outliers_apart(apart, THRESHOLD)
    return QuantLinear(weight, bias), apart, weight.dequantize()


def with_outliers(M: int, K: int, *features: int) -> torch.Tensor:
    x = random(M, K).clamp(-3, 3)
    x[:, list(features)] *= 40
    return x


@pytest.mark.parametrize(("N", "K", "features"), [(64, 64, (5,)), (7, 33, (0, 32)), (100, 128, (1, 2, 3, 127))])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_outliers_are_multiplied_in_float_and_the_rest_in_8_bits(
    N: int, K: int, features: tuple[int, ...], dtype: torch.dtype
) -> None:
    plain, apart, weight = layers(N, K)
    x = with_outliers(9, K, *features).to(dtype)
    large = x.abs() >= THRESHOLD
    assert large.any()
    assert not large.all(0).all()
    wanted = plain(x.float().masked_fill(large, 0)).double() + linear((x * large).double(), weight.double())
    torch.testing.assert_close(apart(x).double(), wanted, rtol=torch.finfo(dtype).eps, atol=1e-3)


def test_without_outliers_nothing_changes() -> None:
    plain, apart, _ = layers(48, 64)
    x = random(5, 64).clamp(-3, 3)
    assert apart(x).equal(plain(x))


def test_a_row_does_not_depend_on_the_others() -> None:
    _, apart, _ = layers(48, 64)
    x = with_outliers(6, 64, 3)
    x[2] *= 10  # this row alone has many
    alone = torch.cat([apart(row[None]) for row in x])
    torch.testing.assert_close(apart(x), alone, rtol=1e-5, atol=1e-4)


def test_it_is_many_times_as_accurate_where_there_are_outliers() -> None:
    plain, apart, weight = layers(64, 256)
    x = with_outliers(32, 256, 17, 200)
    exact = linear(x.double(), weight.double(), plain.bias.double())  # type: ignore[union-attr]
    assert (apart(x) - exact).norm() < (plain(x) - exact).norm() / 5


def test_nan_stays_in_its_row() -> None:
    _, apart, _ = layers(16, 32)
    x = with_outliers(3, 32, 1)
    x[1, 4] = torch.nan
    assert apart(x).isnan().all(1).tolist() == [False, True, False]


def test_activations_take_their_gradient() -> None:
    _, apart, weight = layers(16, 32)
    x = with_outliers(3, 32, 1).requires_grad_()
    apart(x).sum().backward()
    torch.testing.assert_close(x.grad, weight.sum(0).expand(3, 32), rtol=1e-4, atol=1e-4)


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory, save_tiny: Callable[..., Any]) -> Path:
    """A model some of whose norms make single channels large, as those of large models do."""
    folder = tmp_path_factory.mktemp("planted") / "model"
    model = save_tiny(folder, dtype=torch.float32)
    for layer in model.model.layers:
        for norm in (layer.input_layernorm, layer.post_attention_layernorm):
            norm.weight.data[3] = 60.0
    for layer in model.model.layers:  # the weights behind them are small, so that the model is still itself
        attention, mlp = layer.self_attn, layer.mlp
        for linear_layer in (attention.q_proj, attention.k_proj, attention.v_proj, mlp.gate_proj, mlp.up_proj):
            linear_layer.weight.data[:, 3] /= 60.0
    model.save_pretrained(folder)
    return folder


def divergence(folder: Path, **how: Any) -> float:
    ids = torch.randint(0, 250, (1, 64), generator=torch.Generator().manual_seed(0))
    exact = fewbits.AutoModelForCausalLM.from_pretrained(folder, precision="fp32")
    model = fewbits.AutoModelForCausalLM.from_pretrained(folder, load_in_8bit=True, **how)
    with torch.inference_mode():
        p, q = (each(input_ids=ids).logits.log_softmax(-1) for each in (exact, model))
    return kl_div(q, p, log_target=True, reduction="sum").item() / 64


def test_planted_outliers_give_the_known_order(planted: Path) -> None:
    plain = divergence(planted, rotate=False)
    apart = divergence(planted, llm_int8_threshold=THRESHOLD)
    rotated = divergence(planted)
    assert apart < plain / 4
    assert rotated < plain / 4


def test_every_layer_but_the_head_keeps_them_apart(planted: Path) -> None:
    model = fewbits.AutoModelForCausalLM.from_pretrained(planted, load_in_8bit=True, llm_int8_threshold=THRESHOLD)
    kinds = {type(module) for module in model.model.modules() if isinstance(module, QuantLinear)}
    assert kinds == {OutlierLinear}
    assert "outliers from 6" in str(model)


@pytest.mark.parametrize("threshold", [0.0, -1.0, float("nan")])
def test_the_threshold_is_checked(planted: Path, threshold: float) -> None:
    with pytest.raises(FewbitsError, match=r"llm_int8_threshold is .*: a positive magnitude is needed"):
        fewbits.AutoModelForCausalLM.from_pretrained(planted, load_in_8bit=True, llm_int8_threshold=threshold)


def test_other_precisions_have_no_outliers_to_keep_apart(planted: Path) -> None:
    with pytest.raises(FewbitsError, match="has no layers of plain int8 weights and activations; load it with"):
        fewbits.AutoModelForCausalLM.from_pretrained(planted, precision="fp8", llm_int8_threshold=THRESHOLD)
