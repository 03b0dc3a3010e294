"""The manifest: each tensor's format, its bytes, or why it is kept."""

import pytest
import torch
from tiny_gguf import tiny_config

from fewbits.errors import FewbitsError
from fewbits.models.architecture import empty_model
from fewbits.models.manifest import ManifestRow, make_manifest
from fewbits.models.naming import places
from fewbits.models.precision import PRECISIONS

INT8 = PRECISIONS["int8"]


def make(architecture: str = "qwen2", precision: str = "int8", dtype: torch.dtype = torch.bfloat16, **options):
    model = empty_model(tiny_config(architecture), dtype)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    shapes |= options.pop("extra", {})
    rows = make_manifest(model, shapes, places(model, shapes), PRECISIONS[precision], dtype=dtype, **options)
    return {row.tensor: row for row in rows}


def test_linear_layers_are_quantized_and_the_rest_says_why_not() -> None:
    rows = make(extra={"surprise.weight": (3, 5)})
    layer = "model.layers.0.self_attn.q_proj"
    assert rows[f"{layer}.weight"] == ManifestRow(layer, f"{layer}.weight", (64, 64), "int8", 64 * 64 + 2 * 64, None)
    assert rows[f"{layer}.bias"] == ManifestRow(f"{layer}.bias", f"{layer}.bias", (64,), "bf16", 128, "bias")
    reasons = {name: row.reason for name, row in rows.items() if row.reason not in (None, "bias")}
    assert {name for name in reasons if "layers" not in name} == {
        "lm_head.weight", "model.embed_tokens.weight", "model.norm.weight", "surprise.weight",
    }  # fmt: skip
    assert "readers of this layout expect 16 bits" in reasons["lm_head.weight"]
    assert reasons["model.embed_tokens.weight"] == "Embedding, not a linear layer"
    assert reasons["model.layers.1.input_layernorm.weight"] == "Qwen2RMSNorm, not a linear layer"
    assert reasons["surprise.weight"] == "not part of the model's structure"
    assert sum(row.reason is None for row in rows.values()) == 14


@pytest.mark.parametrize(("dtype", "scale"), [(torch.float32, 4), (torch.float16, 2)])
def test_bytes_follow_the_dtype_of_what_is_kept(dtype: torch.dtype, scale: int) -> None:
    rows = make(dtype=dtype)
    assert rows["model.layers.0.mlp.up_proj.weight"].nbytes == 96 * 64 + 96 * scale
    assert rows["model.norm.weight"].nbytes == 64 * scale


@pytest.mark.parametrize("to", ["fp32", "bf16", "fp16"])
def test_a_cast_is_of_every_tensor(to: str) -> None:
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[to]
    rows = make(precision=to, dtype=dtype)
    assert {(row.format, row.reason) for row in rows.values()} == {(to, None)}
    assert all(row.nbytes == torch.Size(row.shape).numel() * dtype.itemsize for row in rows.values())


@pytest.mark.parametrize(
    ("pattern", "count"), [("*", 14), ("*.mlp.*", 6), ("model.layers.?.self_attn.q_proj", 2), ("*.0.*.k_proj", 1)]
)
def test_patterns_name_what_is_kept(pattern: str, count: int) -> None:
    keep = [pattern]
    if count == 14:
        with pytest.raises(FewbitsError, match="Qwen2ForCausalLM has no linear layer to quantize to int8 beside what"):
            make(keep=keep)
    else:
        kept = [row for row in make(keep=keep).values() if row.reason == f"kept by {pattern!r}"]
        assert len(kept) == count
        assert {row.format for row in kept} == {"bf16"}


@pytest.mark.parametrize("pattern", ["lm_heat", "model.layers.0", "model.norm", "q_proj", "*.Q_PROJ", ""])
def test_a_pattern_that_keeps_nothing_is_an_error(pattern: str) -> None:
    with pytest.raises(FewbitsError, match=r"keep: the pattern '.*' matches no linear layer; names look like .*q_proj"):
        make(keep=["*.up_proj", pattern])


def test_a_model_without_linear_layers_is_refused() -> None:
    model = empty_model(tiny_config("llama"), torch.bfloat16)
    norm = {"model.norm.weight": (64,)}
    with pytest.raises(FewbitsError, match="has no linear layer to quantize to int8; convert it to bf16 instead"):
        make_manifest(model, norm, places(model, norm), INT8, dtype=torch.bfloat16)
