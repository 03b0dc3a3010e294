"""A loaded model in the tools of transformers: generate, pipeline, save_pretrained and push_to_hub."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
import transformers
from safetensors import safe_open
from tiny_families import FAMILIES, inputs, output

import fewbits

Saved = Callable[..., Path]
load = fewbits.AutoModelForCausalLM.from_pretrained


@pytest.mark.parametrize("precision", ["int8", "int4"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "bloom", "gemma3", "mixtral", "t5"])
def test_generate(saved: Saved, name: str, precision: str) -> None:
    model = FAMILIES[name].ours.from_pretrained(saved(name), precision=precision)
    ids = inputs(name)["input_ids"][:, :8]
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    cached = model.generate(ids, attention_mask=torch.ones_like(ids), **options)
    assert torch.equal(model.generate(ids, attention_mask=torch.ones_like(ids), use_cache=False, **options), cached)
    beams = model.generate(ids, attention_mask=torch.ones_like(ids), num_beams=2, **options)
    assert beams.shape == cached.shape


def test_a_batch_with_padding(saved: Saved) -> None:
    model = load(saved("llama"), precision="int8")
    alone = torch.tensor([[5, 6, 7]])
    padded = torch.tensor([[0, 0, 5, 6, 7], [9, 8, 7, 6, 5]])
    options = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}
    expected = model.generate(alone, attention_mask=torch.ones_like(alone), **options)[0, 3:]
    assert torch.equal(model.generate(padded, attention_mask=(padded != 0).long(), **options)[0, 5:], expected)


def test_pipelines(saved: Saved) -> None:
    tokenizer = fewbits.AutoTokenizer.from_pretrained(saved("llama"))
    model = load(saved("llama"), precision="int8")
    pipe = transformers.pipeline("text-generation", model=model, tokenizer=tokenizer)
    [answer] = pipe("hello", max_new_tokens=4, do_sample=False)
    assert answer["generated_text"].startswith("hello")
    classifier = fewbits.AutoModelForSequenceClassification.from_pretrained(saved("bert-classifier"), precision="int8")
    pipe = transformers.pipeline("text-classification", model=classifier, tokenizer=tokenizer)
    [found] = pipe("hello")
    assert found["label"] in {"LABEL_0", "LABEL_1"}
    embed = transformers.pipeline(
        "feature-extraction",
        model=fewbits.AutoModel.from_pretrained(saved("bert"), precision="int8"),
        tokenizer=tokenizer,
    )
    assert len(embed("hello")[0][0]) == 64


@pytest.mark.parametrize("precision", ["int8", "int4"])
@pytest.mark.parametrize("rotate", [True, False])
def test_push_to_hub(
    saved: Saved, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, precision: str, rotate: bool
) -> None:
    pushed: dict[str, bytes] = {}

    def commit(self: Any, repo_id: str, operations: Any, **_: Any) -> None:
        assert repo_id == "someone/model"
        for operation in operations:
            with operation.as_file() as file:
                pushed[operation.path_in_repo] = file.read()

    def create(self: Any, repo_id: str, **_: Any) -> huggingface_hub.RepoUrl:
        return huggingface_hub.RepoUrl(f"https://huggingface.co/{repo_id}")

    def no_card(*_: Any, **__: Any) -> None:
        raise huggingface_hub.errors.EntryNotFoundError("README.md")

    monkeypatch.setattr(huggingface_hub.ModelCard, "load", no_card)
    monkeypatch.setattr(huggingface_hub.HfApi, "create_commit", commit)
    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", create)
    model = load(saved("llama"), precision=precision, rotate=rotate)
    model.push_to_hub("someone/model")
    assert {"config.json", "generation_config.json", "model.safetensors"} <= pushed.keys()
    for name, content in pushed.items():
        (tmp_path / name).write_bytes(content)
    method = "compressed-tensors" if not rotate else "fewbits"  # rotated weights are for who rotates
    assert json.loads(pushed["config.json"])["quantization_config"]["quant_method"] == method
    assert torch.equal(output("llama", load(tmp_path, rotate=rotate)), output("llama", model))


def test_shards(saved: Saved, tmp_path: Path) -> None:
    model = load(saved("llama"), precision="int8")
    model.save_pretrained(tmp_path, max_shard_size="60KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    assert torch.equal(output("llama", load(tmp_path)), output("llama", model))


@pytest.mark.parametrize(("precision", "ignored"), [("int8", []), ("int4", ["lm_head"])])
def test_what_is_saved_beside_the_weights(saved: Saved, tmp_path: Path, precision: str, ignored: list[str]) -> None:
    load(saved("llama"), precision=precision).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["quantization_config"]["ignore"] == ignored
    assert config["architectures"] == ["LlamaForCausalLM"]
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_a_plain_model_is_saved_as_always(saved: Saved, tmp_path: Path) -> None:
    model = load(saved("llama"), precision="bf16")
    model.save_pretrained(tmp_path)
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert again.dtype == torch.bfloat16
    assert torch.equal(output("llama", again), output("llama", model))
