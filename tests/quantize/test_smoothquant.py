"""SmoothQuant folded into neighbours: the same model, with channels that 8 bits round better."""

import json
from pathlib import Path

import pytest
import torch
import transformers
from torch import Tensor

import fewbits
from fewbits.errors import FewbitsError
from fewbits.models.source import Source, open_source
from fewbits.quantize.smoothquant import smoothquant
from models.tiny_folder import byte_level_tokenizer, write_folder

WINDOWS = torch.randint(3, 250, (3, 40), generator=torch.Generator().manual_seed(0))
OUTLIERS = [3, 17, 40]
TEXT = "\n".join(f"hello {n} hell {n * n} 漢 don't he'll {n % 7}" for n in range(600))


def model_of(source: Source) -> transformers.PreTrainedModel:
    """The model that transformers builds of a source's configuration and tensors, in float32."""
    model = transformers.AutoModelForCausalLM.from_config(source.config, dtype=torch.float32).eval()
    model.load_state_dict({name: source.read(name).float() for name in source.tensors}, strict=False)
    model.tie_weights()
    return model


def logits(model: torch.nn.Module) -> Tensor:
    with torch.no_grad():
        return model(input_ids=WINDOWS).logits


def largest_inputs(model: torch.nn.Module, name: str) -> Tensor:
    """The largest magnitude of each channel that a layer is given."""
    seen: list[Tensor] = []
    layer = model.get_submodule(name)
    hook = layer.register_forward_pre_hook(lambda _, given: seen.append(given[0].abs().flatten(0, 1).amax(0)))
    logits(model)
    hook.remove()
    return seen[0]


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("llama", {"attention_bias": True, "mlp_bias": True}),
        ("qwen2", {}),
        ("qwen3", {}),
        ("gemma", {"head_dim": 16}),
        ("gemma3_text", {}),
        ("glm", {"head_dim": 16, "attention_bias": True}),
    ],
)
def test_the_folded_model_is_the_same(tmp_path: Path, kind: str, changes: dict, tied: bool) -> None:
    write_folder(tmp_path, kind, byte_level_tokenizer(), dtype=torch.float32, tie_word_embeddings=tied, **changes)
    source = open_source(tmp_path)
    blocks: list[tuple[int, int]] = []
    folded = smoothquant(source, WINDOWS, lambda *at: blocks.append(at))
    assert blocks == [(1, 2), (2, 2)]
    found, expected = logits(model_of(folded)), logits(model_of(source))
    assert (found - expected).norm() <= 1e-5 * expected.norm()
    changed = {name.removeprefix("model.layers.1.") for name in folded.folds.changes if "layers.1." in name}
    up = "mlp.gate_up_proj" if kind == "glm" else "mlp.up_proj"
    assert {"self_attn.v_proj.weight", "self_attn.o_proj.weight", f"{up}.weight", "mlp.down_proj.weight"} <= changed
    assert "input_layernorm.weight" in changed


def test_layernorm_and_conv1d(tmp_path: Path) -> None:
    config = transformers.GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=256, n_positions=64)
    model = transformers.GPT2LMHeadModel(config)
    torch.nn.init.normal_(model.transformer.h[0].ln_1.bias)
    model.save_pretrained(tmp_path)
    source = open_source(tmp_path)
    folded = smoothquant(source, WINDOWS)
    found, expected = logits(model_of(folded)), logits(model_of(source))
    assert (found - expected).norm() <= 1e-5 * expected.norm()
    assert {name.partition("h.0.")[2] for name in folded.folds.changes} >= {
        "ln_1.weight", "ln_1.bias", "attn.c_attn.weight", "ln_2.weight", "ln_2.bias", "mlp.c_fc.weight",
    }  # fmt: skip


def test_large_channels_are_shared_between_activations_and_weights(tmp_path: Path) -> None:
    write_folder(tmp_path, dtype=torch.float32)
    _plant_outliers(tmp_path, 64.0)
    source = open_source(tmp_path)
    folded = smoothquant(source, WINDOWS)
    before, after = (largest_inputs(model_of(each), "model.layers.0.mlp.up_proj") for each in (source, folded))
    assert before[OUTLIERS].min() / before.median() > 30
    assert after[OUTLIERS].max() / after.median() < 4  # its weights were as much smaller
    gain = folded.read("model.layers.0.post_attention_layernorm.weight")
    ratio = source.read("model.layers.0.post_attention_layernorm.weight") / gain
    assert torch.equal(ratio, torch.exp2(ratio.log2().round()))  # powers of two: gains in 16 bits are not rounded


def _plant_outliers(folder: Path, factor: float) -> None:
    """Make some channels that layers are given larger; their weights smaller, so that it is the same model."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    for layer in model.model.layers:
        for norm, readers in (
            (layer.input_layernorm, (layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj)),
            (layer.post_attention_layernorm, (layer.mlp.gate_proj, layer.mlp.up_proj)),
        ):
            norm.weight.data[OUTLIERS] *= factor
            for reader in readers:
                reader.weight.data[:, OUTLIERS] /= factor
    model.save_pretrained(folder)


def test_heads_that_share_values_share_scales(tmp_path: Path) -> None:
    write_folder(tmp_path, dtype=torch.float32)  # 4 query heads of 16 channels to 2 heads of values
    source = open_source(tmp_path)
    folded = smoothquant(source, WINDOWS)
    name = "model.layers.0.self_attn.o_proj.weight"
    ratio = (folded.read(name) / source.read(name)).median(0).values.view(2, 2, 16)
    torch.testing.assert_close(ratio[:, 0], ratio[:, 1])
    assert ratio.std() > 0.1


def test_dead_channels_keep_their_scale(tmp_path: Path) -> None:
    write_folder(tmp_path, dtype=torch.float32)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    layer = model.model.layers[0]
    layer.input_layernorm.weight.data[5] = 0  # what is given is always 0
    layer.mlp.gate_proj.weight.data[:, 7] = 0  # what reads it is 0
    layer.mlp.up_proj.weight.data[:, 7] = 0
    layer.mlp.down_proj.weight.data[:] = 0  # nothing reads any of it
    model.save_pretrained(tmp_path)
    source = open_source(tmp_path)
    folded = smoothquant(source, WINDOWS)
    for norm, channel in (("input_layernorm", 5), ("post_attention_layernorm", 7)):
        name = f"model.layers.0.{norm}.weight"
        assert folded.read(name)[channel] == source.read(name)[channel]
    assert torch.isfinite(logits(model_of(folded))).all()
    name = "model.layers.0.mlp.up_proj.weight"
    gains = folded.read("model.layers.0.post_attention_layernorm.weight")
    scale = source.read("model.layers.0.post_attention_layernorm.weight") / gains
    torch.testing.assert_close(folded.read(name), source.read(name) * scale)


@pytest.mark.parametrize("method", ["smoothquant", "gptq", "smoothquant+gptq", "quarot+smoothquant"])
def test_a_calibration_that_gives_nan_names_the_layer(tmp_path: Path, method: str) -> None:
    write_folder(tmp_path / "plain", dtype=torch.float32)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "plain", dtype=torch.float32)
    model.model.layers[0].mlp.down_proj.weight.data *= 1e38
    model.save_pretrained(tmp_path / "plain")
    (tmp_path / "text.txt").write_text(TEXT)
    with pytest.raises(FewbitsError, match=r"model\.layers\.\d\.\w+\.\w+_proj\.weight: the calibration gave activ"):
        fewbits.convert(tmp_path / "plain", tmp_path / "out", method=method, calibrate=tmp_path / "text.txt")
    assert not (tmp_path / "out").exists()


def test_what_else_reads_a_norm_is_found_out(tmp_path: Path) -> None:
    config = transformers.MixtralConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1,
        num_local_experts=4, vocab_size=256,
    )  # fmt: skip
    transformers.MixtralForCausalLM(config).save_pretrained(tmp_path)
    with pytest.raises(FewbitsError, match=r"calibrate: .*experts.* is stored in another way"):
        smoothquant(open_source(tmp_path), WINDOWS)
    config = transformers.BloomConfig(
        hidden_size=32, n_layer=1, n_head=2, vocab_size=256, apply_residual_connection_post_layernorm=True
    )
    model = transformers.BloomForCausalLM(config)
    for norm in (model.transformer.h[0].input_layernorm, model.transformer.h[0].post_attention_layernorm):
        norm.weight.data.log_normal_(std=2)
    model.save_pretrained(tmp_path / "bloom")
    with pytest.raises(FewbitsError, match=r"transformer\.h\.0 is not the same with scales folded into its layers"):
        smoothquant(open_source(tmp_path / "bloom"), WINDOWS)


def test_without_a_tokenizer_there_is_no_text(tmp_path: Path) -> None:
    write_folder(tmp_path / "plain", dtype=torch.float32)
    for file in (tmp_path / "plain").glob("token*"):
        file.unlink()
    with pytest.raises(FewbitsError, match=r"method='smoothquant': .* has no tokenizer to read text with"):
        fewbits.convert(tmp_path / "plain", tmp_path / "out", method="smoothquant")


def test_a_converted_folder_is_read_by_transformers(tmp_path: Path) -> None:
    write_folder(tmp_path / "plain", dtype=torch.bfloat16)
    (tmp_path / "text.txt").write_text(TEXT)
    names = {"a": "smoothquant+quarot+gptq", "b": "gptq+quarot+smoothquant"}
    folders = [
        fewbits.convert(tmp_path / "plain", tmp_path / out, method=name, calibrate=tmp_path / "text.txt").path
        for out, name in names.items()
    ]
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folders[0], dtype=torch.float32)
    expected = logits(transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "plain", dtype=torch.float32))
    assert (logits(theirs) - expected).norm() < 0.1 * expected.norm()
    marks = [json.loads((folder / "fewbits.json").read_text()) for folder in folders]
    assert marks[0]["method"] == marks[1]["method"] == "smoothquant+quarot+gptq"
    assert len({(folder / "model.safetensors").read_bytes() for folder in folders}) == 1
