"""Keywords of `from_pretrained`: transformers' own reach it, ours are checked; and what is refused by name."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tiny_families import FAMILIES, output, write_family
from torch import nn

import fewbits
from fewbits.errors import FewbitsError
from fewbits.models.experts import QuantExperts
from fewbits.models.linear import QuantHead, QuantLinear

Saved = Callable[..., Path]
load = fewbits.AutoModelForCausalLM.from_pretrained
BOTH = pytest.mark.parametrize("precision", ["fp32", "int8"])


def quantized(model: nn.Module) -> set[str]:
    return {name for name, each in model.named_modules() if isinstance(each, (QuantLinear, QuantExperts))}


@BOTH
def test_attention_of_choice(saved: Saved, precision: str) -> None:
    models = {kind: load(saved("llama"), precision=precision, attn_implementation=kind) for kind in ("eager", "sdpa")}
    assert {kind: model.config._attn_implementation for kind, model in models.items()} == {
        "eager": "eager",
        "sdpa": "sdpa",
    }
    outputs = [output("llama", model) for model in models.values()]
    assert (outputs[0] - outputs[1]).norm() < 0.02 * outputs[0].norm()


@BOTH
@pytest.mark.parametrize("keyword", ["dtype", "torch_dtype"])
@pytest.mark.parametrize("value", [torch.bfloat16, "bfloat16", "torch.bfloat16"], ids=str)
def test_dtype_by_its_names(saved: Saved, precision: str, keyword: str, value: Any) -> None:
    asked = None if precision == "fp32" else precision
    model = load(saved("llama"), precision=asked, **{keyword: value})
    assert model.model.norm.weight.dtype == torch.bfloat16
    assert output("llama", model).dtype == torch.bfloat16


@BOTH
def test_loading_info(saved: Saved, precision: str) -> None:
    model, info = load(saved("llama"), precision=precision, output_loading_info=True)
    assert isinstance(model, transformers.LlamaForCausalLM)
    assert not any(info.values())


@BOTH
def test_a_configuration_given(saved: Saved, precision: str) -> None:
    config = transformers.AutoConfig.from_pretrained(saved("llama"))
    config.num_hidden_layers = 1
    before = config.to_dict()
    with pytest.warns(UserWarning, match="9 tensors have no place in LlamaForCausalLM"):
        model = load(saved("llama"), precision=precision, config=config)
    assert len(model.model.layers) == 1
    assert config.to_dict() == before, "the caller's own is not changed"


@BOTH
def test_fields_of_the_configuration(saved: Saved, precision: str) -> None:
    model = load(saved("llama"), precision=precision, rms_norm_eps=0.5, use_cache=False)
    assert model.config.rms_norm_eps == model.model.norm.variance_epsilon == 0.5
    assert model.config.use_cache is False


@BOTH
def test_a_generation_config_given(saved: Saved, precision: str) -> None:
    given = transformers.GenerationConfig(max_new_tokens=3, do_sample=False)
    model = load(saved("llama"), precision=precision, generation_config=given)
    assert model.generation_config.max_new_tokens == 3


@BOTH
def test_key_mapping(saved: Saved, tmp_path: Path, precision: str) -> None:
    folder = shutil.copytree(saved("llama"), tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    other = {name.replace("model.layers", "decoder.blocks"): tensor for name, tensor in tensors.items()}
    save_file(other, folder / "model.safetensors")
    model = load(folder, precision=precision, key_mapping={r"^decoder\.blocks": "model.layers"})
    assert torch.equal(output("llama", model), output("llama", load(saved("llama"), precision=precision)))


@BOTH
def test_an_unknown_keyword_gets_transformers_own_error(saved: Saved, precision: str) -> None:
    with pytest.raises(TypeError, match="surprise"):
        load(saved("llama"), precision=precision, surprise=1)


@pytest.mark.parametrize("precision", [None, "int8"])
def test_another_quantizer_is_refused(saved: Saved, precision: str | None) -> None:
    config = transformers.BitsAndBytesConfig(load_in_8bit=True)
    with pytest.raises(FewbitsError, match=r"quantization_config: .* give precision="):
        load(saved("llama"), precision=precision, quantization_config=config)


def test_keep(saved: Saved) -> None:
    model = load(saved("llama"), precision="int8", keep=["*.down_proj", "model.layers.1.self_attn.*"])
    gone = {f"model.layers.{n}.mlp.down_proj" for n in (0, 1)}
    gone |= {f"model.layers.1.self_attn.{leaf}_proj" for leaf in "qkvo"}
    assert quantized(model) == FAMILIES["llama"].quantized - gone
    assert model.model.layers[0].mlp.down_proj.weight.dtype == torch.float32


def test_keep_experts(saved: Saved) -> None:
    model = load(saved("mixtral"), precision="int8", keep=["model.layers.0.mlp.experts"])
    assert quantized(model) == FAMILIES["mixtral"].quantized - {"model.layers.0.mlp.experts"}
    assert output("mixtral", model).isfinite().all()


def test_keep_one_of_the_weights_that_are_fused(saved: Saved, tmp_path: Path) -> None:
    keep = ["*.block_sparse_moe.experts.*.w2"]
    with pytest.raises(FewbitsError, match=r"keep: the pattern .* matches no linear layer; names look like model"):
        load(saved("mixtral"), precision="int8", keep=keep)


def test_keep_the_head(saved: Saved) -> None:
    assert type(load(saved("llama"), precision="int8").lm_head) is QuantHead
    assert type(load(saved("llama"), precision="int8", keep=["lm_head"]).lm_head) is nn.Linear


@pytest.mark.parametrize("name", ["gemma3", "gpt2"])
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
def test_keep_a_tied_head(saved: Saved, name: str, stored: torch.dtype) -> None:
    model = load(saved(name, stored), precision="int8", keep=["lm_head"])
    assert model.lm_head.weight is model.get_input_embeddings().weight
    assert model.lm_head.weight.dtype == stored
    assert output(name, model).dtype == torch.float32
    assert type(model.lm_head) is nn.Linear
    assert output(name, model).isfinite().all()


@pytest.mark.parametrize("pattern", ["mlp", "*.mlp.surprise", "model.layers.7.*", ""])
def test_a_pattern_that_matches_nothing(saved: Saved, pattern: str) -> None:
    with pytest.raises(
        FewbitsError, match=r"keep: the pattern .* matches no linear layer; names look like model.layers"
    ):
        load(saved("llama"), precision="int8", keep=[pattern])


def test_keep_everything_is_refused(saved: Saved) -> None:
    with pytest.raises(FewbitsError, match="no linear layer to quantize to int8 beside what is kept"):
        load(saved("llama"), precision="int8", keep=["*"])


@pytest.mark.parametrize("precision", [None, "bf16"])
def test_keep_without_quantizing(saved: Saved, precision: str | None) -> None:
    with pytest.raises(FewbitsError, match=r"keep: .* is not quantized here, so nothing can be kept; leave it out"):
        load(saved("llama"), precision=precision, keep=["*"])


def test_a_string_is_not_a_list_of_patterns(saved: Saved) -> None:
    with pytest.raises(FewbitsError, match=r"keep: .*list"):
        load(saved("llama"), precision="int8", keep="*.down_proj")


# --- what cannot be ------------------------------------------------------------------------------------------------


def test_no_layer_allows_the_groups(saved: Saved, tmp_path: Path) -> None:
    write_family("llama", tmp_path / "narrow", hidden_size=40, intermediate_size=72, head_dim=10)
    with pytest.raises(
        FewbitsError,
        match=r"to quantize to int4: model.*_proj, \d+ input features are no multiple of the group .*int8, ",
    ):
        load(tmp_path / "narrow", precision="int4")
    load(tmp_path / "narrow", precision="int8")


def test_a_layer_that_does_not_allow_the_groups_is_kept(saved: Saved, tmp_path: Path) -> None:
    write_family("llama", tmp_path / "odd", intermediate_size=72)
    model = load(tmp_path / "odd", precision="int4")
    gone = {f"model.layers.{n}.mlp.down_proj" for n in (0, 1)}
    assert quantized(model) == FAMILIES["llama"].quantized - gone
    assert output("llama", model).isfinite().all()


@pytest.mark.parametrize("precision", ["int8", "int4", "fp8"])
def test_a_model_without_linear_layers(tmp_path: Path, precision: str) -> None:
    config = transformers.AutoConfig.for_model("resnet", embedding_size=8, hidden_sizes=[8, 8], depths=[1, 1])
    transformers.AutoModel.from_config(config).save_pretrained(tmp_path)
    with pytest.raises(FewbitsError, match=f"ResNetModel has no linear layer to quantize to {precision}; "):
        fewbits.AutoModel.from_pretrained(tmp_path, precision=precision)
    assert fewbits.AutoModel.from_pretrained(tmp_path, precision="bf16").dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("task", "name", "message"),
    [
        ("ForCausalLM", "t5", "transformers has no causal language model of type 't5'; .*or use AutoModel"),
        ("ForSeq2SeqLM", "llama", "transformers has no AutoModelForSeq2SeqLM of type 'llama'; use another Auto class"),
    ],
)
def test_a_wrong_auto_class(saved: Saved, task: str, name: str, message: str) -> None:
    with pytest.raises(FewbitsError, match=message):
        getattr(fewbits, f"AutoModel{task}").from_pretrained(saved(name), precision="int8")


@pytest.mark.parametrize("name", ["bert", "llama"])
def test_a_model_of_another_family(saved: Saved, tmp_path: Path, name: str) -> None:
    folder = shutil.copytree(saved("gpt2"), tmp_path / "model")
    shutil.copy(saved(name) / "config.json", folder)
    with pytest.raises(FewbitsError, match=r"none of its tensors is of a model of type|are not in the checkpoint"):
        FAMILIES[name].ours.from_pretrained(folder, precision="int8")


def test_experts_that_are_not_quantized_are_named(tmp_path: Path) -> None:
    sizes = FAMILIES["mixtral"].settings | {"head_dim": 16, "layer_types": ["full_attention"] * 2}
    config = transformers.AutoConfig.for_model("gpt_oss", **sizes)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    with pytest.warns(
        UserWarning, match=r"GptOssExperts are not quantized and stay in .*model.layers.0.mlp.experts and 1"
    ):
        model = load(tmp_path, precision="int8")
    assert len(quantized(model)) == 2 * 4 + 1
    load(tmp_path, precision="bf16")


def test_nothing_is_said_while_loading(saved: Saved, capfd: pytest.CaptureFixture[str], caplog: Any) -> None:
    for name in ("llama", "gemma3", "bert", "mixtral"):
        saved(name)
    capfd.readouterr()
    caplog.clear()
    load(saved("llama"), precision="int8")
    load(saved("gemma3"), precision="int8")
    fewbits.AutoModel.from_pretrained(saved("bert"), precision="int4")
    load(saved("mixtral"), precision="bf16")
    said = capfd.readouterr()
    assert (said.out, said.err) == ("", "")
    assert [record.getMessage() for record in caplog.records] == []


def test_the_caller_settings_come_back(saved: Saved) -> None:
    logging = transformers.utils.logging
    before = logging.is_progress_bar_enabled(), logging.get_verbosity()
    load(saved("llama"), precision="int8")
    with pytest.raises(FewbitsError):
        load(saved("llama"), precision="int8", keep=["surprise"])
    assert (logging.is_progress_bar_enabled(), logging.get_verbosity()) == before
    assert json.loads((saved("llama") / "config.json").read_text()).get("quantization_config") is None
