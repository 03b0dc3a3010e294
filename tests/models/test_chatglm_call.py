"""The call that fewbits exists for: ChatGLM3 in 8 bits by its Hub id, on today's transformers, as it was written."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from fewbits import AutoModel, AutoTokenizer
from fewbits.models.linear import QuantHead, QuantLinear

SHARED = Path(__file__).parents[3] / "shared" / "chatglm3"
COMMIT = "0123456789abcdef0123456789abcdef01234567"

pytestmark = pytest.mark.skipif(not SHARED.is_dir(), reason="the ChatGLM3 files are not beside the repository")


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A Hugging Face cache that holds a tiny ChatGLM3 under its published name, and no network."""
    model = tmp_path / "hub" / "models--THUDM--chatglm3-6b"
    snapshot = model / "snapshots" / COMMIT
    shutil.copytree(SHARED / "tiny", snapshot)
    for name in ("tokenizer.model", "tokenizer_config.json"):
        shutil.copy(SHARED / name, snapshot)
    (snapshot / "modeling_chatglm.py").write_text("raise AssertionError('remote code was run')\n")
    (model / "refs").mkdir()
    (model / "refs" / "v0.1.0").write_text(COMMIT)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


@pytest.mark.usefixtures("hub")
def test_the_call_as_written() -> None:
    tokenizer = AutoTokenizer.from_pretrained("THUDM/chatglm3-6b", revision="v0.1.0", trust_remote_code=True)
    model = AutoModel.from_pretrained(
        "THUDM/chatglm3-6b", revision="v0.1.0", load_in_8bit=True, trust_remote_code=True, device_map="auto"
    )
    layers = [type(module) for module in model.modules() if isinstance(module, QuantLinear)]
    assert layers.count(QuantHead) == 1, "the language head comes with it"
    assert len(layers) > model.config.num_hidden_layers * 4
    assert tokenizer("Precision is a budget.").input_ids[:2] == [64790, 64792]

    reference = load_file(SHARED / "tiny" / "reference.safetensors")
    with torch.no_grad():
        logits = model(reference["input_ids"]).logits
    assert (logits - reference["logits"]).abs().mean() < 0.05 * reference["logits"].std()
    written = model.generate(reference["input_ids"][:1], max_new_tokens=4, do_sample=False)
    assert written.shape == (1, reference["input_ids"].shape[1] + 4)


@pytest.mark.usefixtures("hub")
def test_the_same_in_4_bits() -> None:
    model = AutoModel.from_pretrained("THUDM/chatglm3-6b", revision="v0.1.0", load_in_4bit=True, device_map="auto")
    reference = load_file(SHARED / "tiny" / "reference.safetensors")
    with torch.no_grad():
        logits = model(reference["input_ids"]).logits
    assert 0.05 < (logits - reference["logits"]).abs().mean() / reference["logits"].std() < 0.5
