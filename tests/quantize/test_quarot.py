"""QuaRot folded into weights: the same model in another basis, for the models of which that is true."""

import json
from pathlib import Path

import pytest
import torch
import transformers
from torch import Tensor

import fewbits
from fewbits.errors import FewbitsError
from fewbits.models.source import Source, open_source
from fewbits.quantize.folding import FoldedSource
from fewbits.quantize.quarot import Rotation, quarot
from models.tiny_folder import byte_level_tokenizer, write_folder

IDS = torch.arange(48)[None] * 7 % 250 + 3


def model_of(source: Source) -> transformers.PreTrainedModel:
    """The model that transformers builds of a source's configuration and tensors, in float32."""
    model = transformers.AutoModelForCausalLM.from_config(source.config, dtype=torch.float32).eval()
    loaded = model.load_state_dict({name: source.read(name).float() for name in source.tensors}, strict=False)
    assert not loaded.unexpected_keys
    assert set(loaded.missing_keys) <= set(model.all_tied_weights_keys)
    model.tie_weights()
    return model


def logits(model: torch.nn.Module) -> Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


def assert_the_same(found: Tensor, expected: Tensor) -> None:
    assert (found - expected).norm() <= 1e-5 * expected.norm()


@pytest.mark.parametrize("n", [64, 48, 72, 576, 7])
def test_a_rotation_is_orthogonal_and_mixes_all_features(n: int) -> None:
    matrix = Rotation(n)(torch.eye(n)).double()
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(n, dtype=torch.float64), rtol=0, atol=1e-6)
    assert matrix.abs().max() <= (2 / n) ** 0.5 + 1e-6
    x = torch.randn(3, 2, n)
    torch.testing.assert_close(Rotation(n)(x), (x.double() @ matrix).float())


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("llama", {"attention_bias": True, "mlp_bias": True, "hidden_size": 72, "head_dim": 16}),
        ("mistral", {}),
        ("qwen2", {}),
        ("qwen3", {}),
        ("gemma", {"head_dim": 16}),
        ("glm", {"head_dim": 16, "attention_bias": True}),
    ],
)
def test_the_folded_model_is_the_same(tmp_path: Path, kind: str, changes: dict, tied: bool) -> None:
    write_folder(tmp_path, kind, byte_level_tokenizer(), dtype=torch.float32, tie_word_embeddings=tied, **changes)
    source = open_source(tmp_path)
    folded = quarot(source)
    found, expected = model_of(folded), model_of(source)
    assert_the_same(logits(found), logits(expected))
    assert not found.config.tie_word_embeddings
    assert found.lm_head.weight.data_ptr() != found.model.embed_tokens.weight.data_ptr()
    one = 0.0 if kind == "gemma" else 1.0
    assert all((norm == one).all() for name, norm in found.named_parameters() if "layernorm" in name)
    for name in ("model.layers.0.self_attn.o_proj.weight", "model.layers.1.mlp.down_proj.weight"):
        before = expected.get_parameter(name)
        assert (found.get_parameter(name) - before).norm() > 0.5 * before.norm()


def test_rows_are_those_of_the_whole(tmp_path: Path) -> None:
    write_folder(tmp_path, dtype=torch.float32, tie_word_embeddings=True)
    source = open_source(tmp_path)
    folded = quarot(source)
    assert isinstance(folded, FoldedSource)
    assert {*folded.tensors} == {*source.tensors, "lm_head.weight"}
    assert folded.tensors["lm_head.weight"].shape == folded.tensors["model.embed_tokens.weight"].shape
    for name in ("lm_head.weight", "model.layers.0.mlp.up_proj.weight", "model.layers.0.input_layernorm.weight"):
        assert torch.equal(folded.read_rows(name, 2, 9), folded.read(name)[2:9])
    assert folded.tokenizer().get_vocab() == source.tokenizer().get_vocab()
    assert folded.generation_config().eos_token_id == [2, 1]
    assert source.config.tie_word_embeddings  # whose configuration is left alone


@pytest.mark.parametrize("tied", [False, True])
def test_a_converted_folder_is_read_by_transformers_and_says_what_it_costs(tmp_path: Path, tied: bool) -> None:
    write_folder(tmp_path / "plain", dtype=torch.float32, tie_word_embeddings=tied)
    done = fewbits.convert(tmp_path / "plain", tmp_path / "out", method="quarot")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(done.path, dtype=torch.float32)
    expected = logits(model_of(open_source(tmp_path / "plain")))
    assert (logits(theirs) - expected).norm() < 0.05 * expected.norm()
    assert torch.isfinite(logits(fewbits.AutoModelForCausalLM.from_pretrained(done.path))).all()
    head = next(row for row in done.manifest if row.tensor == "lm_head.weight")
    assert ("unties it from the embedding" in head.reason) == tied
    assert json.loads((done.path / "fewbits.json").read_text())["method"] == "quarot"
    assert json.loads((done.path / "config.json").read_text())["tie_word_embeddings"] is False


@pytest.mark.parametrize(
    ("family", "why"),
    [
        ("gpt2", "GPT2LMHeadModel cannot be rotated by its weights: its LayerNorm subtracts a mean"),
        ("gemma2", "Gemma2ForCausalLM .* exact for language models of the kinds llama, .*, and this one is of the"),
        ("bert", "BertForMaskedLM cannot be rotated"),
    ],
)
def test_models_of_which_it_is_not_true_are_refused_by_name(tmp_path: Path, family: str, why: str) -> None:
    config = {
        "gpt2": transformers.GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=64),
        "gemma2": transformers.Gemma2Config(
            hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1,
            head_dim=16, vocab_size=64,
        ),
        "bert": transformers.BertConfig(
            hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, vocab_size=64
        ),
    }[family]  # fmt: skip
    kind = transformers.AutoModelForMaskedLM if family == "bert" else transformers.AutoModelForCausalLM
    kind.from_config(config).save_pretrained(tmp_path / "plain")
    with pytest.raises(FewbitsError, match=rf"method='quarot': {why}"):
        fewbits.convert(tmp_path / "plain", tmp_path / "out", method="quarot")
    assert not (tmp_path / "out").exists()


def test_what_is_quantized_already_is_refused(tiny_int8: Path, tmp_path: Path) -> None:
    with pytest.raises(FewbitsError, match=r"method='quarot': .*tiny-int8 is quantized already"):
        fewbits.convert(tiny_int8, tmp_path / "out", "int4", method="quarot")


def test_bad_names(tiny: Path, tmp_path: Path) -> None:
    for method, message in {
        "quarot+best": "method 'best' is unknown; known: absmax, mse, gptq, smoothquant, quarot, joined by",
        "quarot+quarot": "names quarot twice",
        "mse+gptq": "mse and gptq exclude each other",
    }.items():
        with pytest.raises(FewbitsError, match=message):
            fewbits.convert(tiny, tmp_path / "out", "int8", method=method)
    with pytest.raises(FewbitsError, match="method='quarot': fp8 loses by rotation"):
        fewbits.convert(tiny, tmp_path / "out", "fp8", method="quarot")
    with pytest.raises(FewbitsError, match="rotate: method quarot rotates already, and twice is worse"):
        fewbits.convert(tiny, tmp_path / "out", "int8", method="quarot", rotate=True)
    with pytest.raises(FewbitsError, match="method='quarot': a cast to bf16 has no scales to find"):
        fewbits.convert(tiny, tmp_path / "out", "bf16", method="quarot")


def test_what_is_folded_is_not_rotated_again_and_the_rest_is(tmp_path: Path) -> None:
    write_folder(tmp_path / "plain", dtype=torch.float32)
    folder = fewbits.convert(tmp_path / "plain", tmp_path / "out", method="quarot").path
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    assert config["quant_method"] == "compressed-tensors"
    loaded = fewbits.AutoModelForCausalLM.from_pretrained(folder)
    layer = loaded.model.layers[0]
    assert layer.mlp.down_proj.rotation == 32
    assert not any(each.rotation for each in (*layer.self_attn.children(), layer.mlp.up_proj, loaded.lm_head))
    plain = fewbits.AutoModelForCausalLM.from_pretrained(folder, rotate=False)
    assert not plain.model.layers[0].mlp.down_proj.rotation
    for name, model in {"rotated": loaded, "plain": plain}.items():
        model.save_pretrained(tmp_path / name)
        options = {} if name == "rotated" else {"rotate": False}
        again = fewbits.AutoModelForCausalLM.from_pretrained(tmp_path / name, **options)
        assert torch.equal(logits(again), logits(model))


def test_plain_codes_are_taken_over_whatever_they_are_given(tmp_path: Path) -> None:
    write_folder(tmp_path / "plain", dtype=torch.float32)
    folder = fewbits.convert(tmp_path / "plain", tmp_path / "out", method="quarot").path
    again = fewbits.convert(folder, tmp_path / "bnb", layout="bitsandbytes")
    assert again.rounding == "codes and scales of int8 are taken over as they are"
