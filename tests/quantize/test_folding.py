"""Planted outliers: what each way to 8 bits loses on a model of which a few channels are large by its norms' gains."""

from pathlib import Path

import pytest
import torch
import transformers
from torch import Tensor

import fewbits
from models.tiny_folder import byte_level_tokenizer, write_folder

OUTLIERS = [3, 17, 40, 101, 200]
IDS = torch.randint(3, 250, (2, 96), generator=torch.Generator().manual_seed(1))
TEXT = "\n".join(f"hello {n} hell {n * n} 漢 don't he'll {n % 7}" for n in range(1500))


@pytest.fixture(scope="module")
def outlying(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama whose layers are given channels 30 times as large as the others, and have small weights for them."""
    folder = tmp_path_factory.mktemp("outlying") / "model"
    sizes = {"hidden_size": 256, "intermediate_size": 512, "initializer_range": 0.06}
    write_folder(folder, "llama", byte_level_tokenizer(), dtype=torch.float32, **sizes)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    for layer in model.model.layers:
        for norm in (layer.input_layernorm, layer.post_attention_layernorm):
            norm.weight.data[OUTLIERS] *= 30
        attention, mlp = layer.self_attn, layer.mlp
        for reader in (attention.q_proj, attention.k_proj, attention.v_proj, mlp.gate_proj, mlp.up_proj):
            reader.weight.data[:, OUTLIERS] /= 30
    model.save_pretrained(folder)
    (folder.parent / "text.txt").write_text(TEXT)
    return folder


def log_probabilities(model: torch.nn.Module) -> Tensor:
    with torch.no_grad():
        return model(IDS).logits.double().log_softmax(-1)


@pytest.fixture(scope="module")
def losses(outlying: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, float]:
    """KL divergence from float32 by how the model is quantized; what readers without rotation make of folders."""
    out, load = tmp_path_factory.mktemp("out"), fewbits.AutoModelForCausalLM.from_pretrained
    expected = log_probabilities(load(outlying, precision="fp32"))

    def loss(model: torch.nn.Module) -> float:
        found = log_probabilities(model)
        return (expected.exp() * (expected - found)).sum(-1).mean().item()

    found = {}
    for method in ("absmax", "smoothquant", "quarot", "quarot+gptq"):
        text = outlying.parent / "text.txt" if method not in ("absmax", "quarot") else None
        folder = fewbits.convert(outlying, out / method, method=method, calibrate=text).path
        found[method] = loss(load(folder, rotate=False))
    found["rotated while running"] = loss(load(outlying, load_in_8bit=True))
    found["LLM.int8()"] = loss(load(outlying, load_in_8bit=True, llm_int8_threshold=6.0))
    return found


@pytest.mark.parametrize("better", ["smoothquant", "quarot", "quarot+gptq", "rotated while running", "LLM.int8()"])
def test_plain_absmax_is_the_worst(losses: dict[str, float], better: str) -> None:
    assert losses[better] < 0.5 * losses["absmax"]


def test_folds_are_better_than_rotation_alone_where_gains_make_the_outliers(losses: dict[str, float]) -> None:
    assert losses["rotated while running"] < losses["absmax"] / 4
    # A gain that is folded into weights is gone, and one that is evened out is small; a rotation only spreads it.
    for fold in ("smoothquant", "quarot", "quarot+gptq"):
        assert losses[fold] < losses["rotated while running"] / 2
    assert losses["quarot"] < 1.2 * losses["smoothquant"]
