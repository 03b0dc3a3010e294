"""SQNR of layers: exact on layers whose noise is known, and through real quantized layers."""

import copy
import math
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from torch import nn

import fewbits
from fewbits.errors import FewbitsError
from fewbits.measure.layers import ReferenceLayers, sqnr_db

WINDOW = torch.arange(64)
TinyLlama = Callable[..., Any]


def noise_of(reference: Any, candidate: Any) -> dict[str, float | None]:
    with ReferenceLayers(reference, WINDOW) as recorded:
        return {layer.module: layer.sqnr_db for layer in recorded.measure(candidate)}


class Attention(nn.Module):
    """Three projections of one input, apart or in one, and one of their sum."""

    def __init__(self, merged: bool) -> None:
        super().__init__()
        widths = {"qkv_proj": 32} if merged else {"q_proj": 16, "k_proj": 8, "v_proj": 8}
        for name, width in widths.items():
            self.add_module(name, nn.Linear(16, width, bias=False))
        self.o_proj = nn.Linear(8, 24)
        self.embed = nn.Embedding(64, 16)

    def forward(self, input_ids: torch.Tensor) -> SimpleNamespace:
        x = self.embed(input_ids)
        apart = hasattr(self, "q_proj")
        v = (self.q_proj(x)[..., :8] + self.k_proj(x) + self.v_proj(x)) if apart else self.qkv_proj(x)[..., 24:]
        return SimpleNamespace(logits=self.o_proj(v))


@pytest.fixture
def attention() -> Attention:
    torch.manual_seed(0)
    return Attention(merged=False).eval()


def test_of_known_noise() -> None:
    y = torch.tensor([3.0, 4.0])
    assert sqnr_db(y, y + torch.tensor([0.3, 0.4])) == pytest.approx(20.0, abs=1e-5)
    assert sqnr_db(y, 2 * y) == pytest.approx(0.0)
    assert sqnr_db(y, y) is None
    assert sqnr_db(y, y * math.nan) is None


def test_each_layer_is_given_what_the_reference_gave_it(tiny_llama: TinyLlama) -> None:
    """What one layer loses is not counted again in those after it."""
    candidate = tiny_llama()
    with torch.no_grad():
        candidate.model.layers[0].mlp.down_proj.weight *= 1 + 2**-6
    noise = noise_of(tiny_llama(), candidate)
    assert len(noise) == 2 * 7 + 1
    assert noise.pop("model.layers.0.mlp.down_proj") == pytest.approx(20 * math.log10(2**6), abs=0.01)
    assert set(noise.values()) == {None}


def test_bf16_has_eight_bits_of_precision(tiny_llama: TinyLlama) -> None:
    noise = noise_of(tiny_llama(), tiny_llama().bfloat16())
    assert all(44 < sqnr < 60 for sqnr in noise.values())  # 6.02 dB a bit, 8 bits and what sums of errors leave


@pytest.mark.parametrize("precision", ["int8", "int8-weight", "int4", "fp8"])
def test_quantized_layers_rotated_or_not(tiny: Path, precision: str) -> None:
    reference = fewbits.AutoModelForCausalLM.from_pretrained(tiny, precision="fp32")
    least = {"int8": 32, "int8-weight": 34, "int4": 12, "fp8": 24}[precision]
    for rotate in (True, False):
        candidate = fewbits.AutoModelForCausalLM.from_pretrained(tiny, precision=precision, rotate=rotate)
        noise = noise_of(reference, candidate)
        assert len(noise) == 2 * 7 + 1
        assert all(sqnr is not None and sqnr > least for sqnr in noise.values()), noise


def test_formats_and_bits(tiny: Path) -> None:
    reference = fewbits.AutoModelForCausalLM.from_pretrained(tiny, precision="bf16")
    candidate = fewbits.AutoModelForCausalLM.from_pretrained(tiny, precision="int4", keep=["*.down_proj"])
    with ReferenceLayers(reference, WINDOW) as recorded:
        assert {(layer.format, layer.bits, layer.sqnr_db) for layer in recorded.layers} == {("bf16", 16.0, None)}
        layers = {layer.module: (layer.format, layer.bits) for layer in recorded.measure(candidate)}
    assert layers["model.layers.1.mlp.down_proj"] == ("fp32", 32.0)
    assert layers["model.layers.1.mlp.up_proj"] == ("int4", 4.5)  # groups of 32
    assert layers["lm_head"] == ("int8", 8.25)


def test_a_quantized_model_is_a_reference_too(tiny_int8: Path) -> None:
    noise = noise_of(*(fewbits.AutoModelForCausalLM.from_pretrained(tiny_int8) for _ in range(2)))
    assert len(noise) == 2 * 7 + 1
    assert set(noise.values()) == {None}


def test_merged_projections_are_compared_part_by_part(attention: Attention) -> None:
    merged = Attention(merged=True).eval()
    factors = {"q_proj": 2**-4, "k_proj": 2**-5, "v_proj": 2**-6}
    parts = [(1 + factor) * attention.get_submodule(name).weight.detach() for name, factor in factors.items()]
    merged.qkv_proj.weight.data = torch.cat(parts)
    merged.o_proj.load_state_dict(attention.o_proj.state_dict())
    noise = noise_of(attention, merged)
    assert noise.pop("o_proj") is None
    assert noise == pytest.approx({name: -20 * math.log10(factor) for name, factor in factors.items()}, abs=0.01)


def test_layers_that_only_one_of_them_has(attention: Attention) -> None:
    other = copy.deepcopy(attention)
    del other.k_proj
    other.extra = nn.Linear(3, 3)
    other.o_proj = nn.Linear(8, 20)  # of another width
    with ReferenceLayers(attention, WINDOW) as recorded:
        found = {layer.module: layer.sqnr_db for layer in recorded.measure(other)}
    assert found == {"q_proj": None, "v_proj": None, "extra": None, "o_proj": None}


@pytest.mark.parametrize("kind", ["mixtral", "gpt2"])
def test_experts_and_conv1d(kind: str, tmp_path: Path) -> None:
    sizes = {"vocab_size": 64, "bos_token_id": 0, "eos_token_id": 0}
    settings: dict[str, Any] = {
        "mixtral": {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2,
                    "num_key_value_heads": 1, "num_local_experts": 4, "num_experts_per_tok": 2},
        "gpt2": {"n_embd": 32, "n_layer": 1, "n_head": 2, "n_positions": 64},
    }  # fmt: skip
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(kind, **settings[kind], **sizes)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    reference = fewbits.AutoModelForCausalLM.from_pretrained(tmp_path, precision="fp32")
    noise = noise_of(reference, fewbits.AutoModelForCausalLM.from_pretrained(tmp_path, precision="int8"))
    inner = {"mixtral": "model.layers.0.mlp.experts", "gpt2": "transformer.h.0.attn.c_attn"}[kind]
    assert inner in noise
    assert all(sqnr is None or sqnr > 30 for sqnr in noise.values()), noise
    assert noise[inner] is not None


def test_a_full_disk_is_told(monkeypatch: pytest.MonkeyPatch, attention: Attention) -> None:
    monkeypatch.setattr(tempfile, "TemporaryFile", lambda **_: Path("/dev/full").open("r+b", 0))  # noqa: SIM115
    with pytest.raises(FewbitsError, match="became full while the inputs and outputs of the reference's layers were"):
        ReferenceLayers(attention, WINDOW)


def test_no_hook_stays(attention: Attention) -> None:
    ReferenceLayers(attention, WINDOW).close()
    assert not any(module._forward_hooks for module in attention.modules())

    def broken(**_: Any) -> None:
        raise KeyboardInterrupt

    attention.forward = broken  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        ReferenceLayers(attention, WINDOW)
    assert not any(module._forward_hooks for module in attention.modules())
