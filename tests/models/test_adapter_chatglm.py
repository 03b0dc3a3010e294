"""ChatGLM2 and ChatGLM3 under transformers' GLM: the same logits, from rows of the file, without remote code."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tiny_chatglm import CONFIG, SHARED, needs_original, save, weights
from tiny_sentencepiece import write_sentencepiece

import fewbits
from fewbits.errors import FewbitsError
from fewbits.models.load import AutoModel
from fewbits.models.safetensors_folder import SafetensorsFolder
from fewbits.models.source import open_source

EPS = torch.finfo(torch.float32).eps
IDS = torch.arange(5, 45).view(2, 20)
LAYER = "transformer.encoder.layers.1."
load = fewbits.AutoModelForCausalLM.from_pretrained


def equations(config: dict[str, Any], w: dict[str, torch.Tensor], *, base: float, divide: float) -> torch.Tensor:
    """The original's forward pass, written down once more in float64."""
    w = {name: tensor.double() for name, tensor in w.items()}
    heads, groups, channels = (config[k] for k in ("num_attention_heads", "multi_query_group_num", "kv_channels"))
    batch, length = IDS.shape
    half = channels // 2
    angles = torch.outer(torch.arange(length) / divide, base ** -(torch.arange(0, half, 2).double() / half))
    turn = torch.polar(torch.ones_like(angles), angles)[:, None]  # [length, 1, half / 2]
    causal = torch.full((length, length), -torch.inf).triu(1).double()

    def norm(x: torch.Tensor, gain: torch.Tensor) -> torch.Tensor:
        return x * (x.pow(2).mean(-1, keepdim=True) + config["layernorm_epsilon"]).rsqrt() * gain

    def rotate(x: torch.Tensor) -> torch.Tensor:  # the first half of the channels, in neighbouring pairs
        pairs = torch.view_as_complex(x[..., :half].reshape(*x.shape[:-1], half // 2, 2))
        return torch.cat([torch.view_as_real(pairs * turn).flatten(-2), x[..., half:]], -1)

    x = w["transformer.embedding.word_embeddings.weight"][IDS]
    for layer in range(config["num_layers"]):
        p = f"transformer.encoder.layers.{layer}."
        fused = norm(x, w[p + "input_layernorm.weight"]) @ w[p + "self_attention.query_key_value.weight"].T
        if config["add_qkv_bias"]:
            fused = fused + w[p + "self_attention.query_key_value.bias"]
        q, k, v = fused.split([heads * channels, groups * channels, groups * channels], -1)
        q = rotate(q.view(batch, length, heads, channels))
        k = rotate(k.view(batch, length, groups, channels)).repeat_interleave(heads // groups, 2)
        v = v.view(batch, length, groups, channels).repeat_interleave(heads // groups, 2)
        scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / channels**0.5 + causal
        mixed = torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), v).flatten(2)
        x = x + mixed @ w[p + "self_attention.dense.weight"].T
        gate, up = (norm(x, w[p + "post_attention_layernorm.weight"]) @ w[p + "mlp.dense_h_to_4h.weight"].T).chunk(
            2, -1
        )
        x = x + (torch.nn.functional.silu(gate) * up) @ w[p + "mlp.dense_4h_to_h.weight"].T
    return norm(x, w["transformer.encoder.final_layernorm.weight"]) @ w["transformer.output_layer.weight"].T


def logits(model: Any, ids: torch.Tensor = IDS, **inputs: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(ids, **inputs).logits


def error(got: torch.Tensor, wanted: torch.Tensor) -> float:
    """The largest difference, in eps of the largest logit."""
    return float((got - wanted).abs().max() / wanted.abs().max() / EPS)


@needs_original
def test_the_logits_are_the_originals() -> None:
    reference = load_file(SHARED / "tiny/reference.safetensors")
    assert error(logits(load(SHARED / "tiny"), reference["input_ids"]), reference["logits"]) <= 4


@needs_original
def test_int8_is_near_the_original() -> None:
    reference = load_file(SHARED / "tiny/reference.safetensors")
    got = logits(load(SHARED / "tiny", precision="int8"), reference["input_ids"])
    assert 1e-4 < error(got, reference["logits"]) * EPS < 0.1


VARIANTS: dict[str, tuple[dict[str, Any], float, float]] = {
    "chatglm3": ({}, 1e4, 1),
    "no bias": ({"add_qkv_bias": False}, 1e4, 1),
    "one group": ({"multi_query_group_num": 1}, 1e4, 1),
    "a group per head": ({"multi_query_group_num": 4}, 1e4, 1),
    "wide heads": ({"kv_channels": 16}, 1e4, 1),
    "another epsilon": ({"layernorm_epsilon": 0.1}, 1e4, 1),
    "chatglm3-32k": ({"rope_ratio": 50}, 5e5, 1),
    "chatglm2-32k": ({"rope_ratio": 16, "_name_or_path": "THUDM/chatglm2-6b-32k"}, 1e4, 16),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_logits_are_those_of_the_equations(tmp_path: Path, variant: str) -> None:
    changes, base, divide = VARIANTS[variant]
    expected = equations(CONFIG | changes, save(tmp_path, **changes), base=base, divide=divide)
    assert error(logits(load(tmp_path)), expected.float()) <= 64


def test_the_configuration(tmp_path: Path) -> None:
    save(tmp_path)
    config = open_source(tmp_path).config
    assert type(config) is transformers.GlmConfig
    assert (config.max_position_embeddings, config.vocab_size, config.tie_word_embeddings) == (64, 384, False)
    assert (config.eos_token_id, config.pad_token_id, config.dtype) == (2, 0, torch.float32)
    assert config.architectures == ["GlmForCausalLM"]


@needs_original
def test_the_published_model_has_all_parameters_of_glm(tmp_path: Path) -> None:
    shutil.copy(SHARED / "config.json", tmp_path)
    shapes = weights(json.loads((SHARED / "config.json").read_text()), device="meta")
    header, end = {}, 0
    for name, tensor in shapes.items():
        start, end = end, end + 2 * tensor.numel()
        header[name] = {"dtype": "F16", "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    with (tmp_path / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)  # 12.5 GB of nothing, which take no room
    source = open_source(tmp_path)
    with torch.device("meta"):
        wanted = transformers.GlmForCausalLM(source.config)
    assert {name: tensor.shape for name, tensor in source.tensors.items()} == {
        name: tuple(parameter.shape) for name, parameter in wanted.named_parameters()
    }
    assert sum(parameter.numel() for parameter in wanted.parameters()) == 6_243_584_000
    assert (source.config.max_position_embeddings, source.config.dtype) == (8192, torch.float16)


def test_a_tied_head_needs_no_tensor(tmp_path: Path) -> None:
    tensors = save(tmp_path, tie_word_embeddings=True)
    tensors["transformer.output_layer.weight"] = tensors["transformer.embedding.word_embeddings.weight"].clone()
    expected = equations(CONFIG, tensors, base=1e4, divide=1)
    tensors.pop("transformer.output_layer.weight")
    save_file(tensors, tmp_path / "model.safetensors")
    assert error(logits(load(tmp_path)), expected.float()) <= 64


def test_generation_with_and_without_cache(tmp_path: Path) -> None:
    save(tmp_path)
    model = load(tmp_path)
    options = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None}
    mask = torch.ones_like(IDS)
    cached = model.generate(IDS, attention_mask=mask, use_cache=True, **options)
    assert cached.shape == (2, 32)
    assert torch.equal(cached, model.generate(IDS, attention_mask=mask, use_cache=False, **options))


def test_padding_on_the_left_changes_nothing(tmp_path: Path) -> None:
    save(tmp_path)
    model = load(tmp_path)
    padded = torch.cat([torch.zeros(2, 7, dtype=torch.long), IDS], 1)
    mask = (torch.arange(27) >= 7).long().expand(2, -1)
    position_ids = (mask.cumsum(-1) - 1).clamp(min=0)
    got = logits(model, padded, attention_mask=mask, position_ids=position_ids)[:, 7:]
    assert error(got, logits(model)) <= 64
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    alone = model.generate(IDS, attention_mask=torch.ones_like(IDS), **options)
    assert torch.equal(model.generate(padded, attention_mask=mask, **options)[:, 7:], alone)


@pytest.mark.parametrize("cls", [AutoModel, fewbits.AutoModelForCausalLM])
def test_both_classes_give_the_language_head_and_run_no_remote_code(tmp_path: Path, cls: Any) -> None:
    save(tmp_path)
    model = cls.from_pretrained(tmp_path, load_in_8bit=True, trust_remote_code=True)
    assert type(model) is transformers.GlmForCausalLM


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_a_converted_folder_is_read_by_stock_transformers(tmp_path: Path, precision: str) -> None:
    save(tmp_path / "model")
    write_sentencepiece(tmp_path / "model/tokenizer.model")
    folder = fewbits.convert(tmp_path / "model", tmp_path / "out", precision).path
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    assert type(theirs) is transformers.GlmForCausalLM
    assert error(logits(theirs), logits(load(tmp_path / "model"))) <= (0 if precision == "fp32" else 0.2 / EPS)
    messages = [{"role": "user", "content": "hello <|user|>"}]
    expected = fewbits.AutoTokenizer.from_pretrained(tmp_path / "model").apply_chat_template(messages)
    assert transformers.AutoTokenizer.from_pretrained(folder).apply_chat_template(messages) == expected


@needs_original
def test_the_converted_original_is_read_by_stock_transformers(tmp_path: Path) -> None:
    for file in ("tiny/config.json", "tiny/model.safetensors", "tokenizer.model", "tokenizer_config.json"):
        shutil.copy(SHARED / file, tmp_path)
    folder = fewbits.convert(tmp_path, tmp_path / "out", "fp32").path
    reference = load_file(SHARED / "tiny/reference.safetensors")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    assert error(logits(theirs, reference["input_ids"]), reference["logits"]) <= 4
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    assert tokenizer("精度是预算。").input_ids == [64790, 64792, 30910, 42038, 54532, 34691, 31155]


def test_a_part_is_read_from_its_own_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = save(tmp_path)
    source = open_source(tmp_path)
    assert [*source.tensors][:2] == ["model.embed_tokens.weight", "model.norm.weight"]  # the file's order
    read: list[torch.Tensor] = []

    def record(self: SafetensorsFolder, name: str, start: int, stop: int) -> torch.Tensor:
        read.append(read_rows(self, name, start, stop))
        return read[-1]

    read_rows = SafetensorsFolder.read_rows
    monkeypatch.setattr(SafetensorsFolder, "read_rows", record)
    monkeypatch.setattr(SafetensorsFolder, "read", None)
    for name, tensor in source.tensors.items():
        read.clear()
        values = source.read(name)
        assert values.shape == tensor.shape
        assert sum(part.nbytes for part in read) == tensor.nbytes == values.nbytes
    fused = tensors[LAYER + "self_attention.query_key_value.weight"]
    assert torch.equal(source.read_rows("model.layers.1.self_attn.v_proj.weight", 3, 9), fused[51:57])
    assert sum(tensor.nbytes for tensor in source.tensors.values()) == sum(
        tensor.nbytes for name, tensor in tensors.items() if "inv_freq" not in name
    )


def test_a_checkpoint_in_pickles(tmp_path: Path) -> None:
    tensors = save(tmp_path)
    expected = logits(load(tmp_path))
    (tmp_path / "model.safetensors").unlink()
    torch.save(tensors, tmp_path / "pytorch_model.bin")
    assert torch.equal(logits(load(tmp_path)), expected)


@pytest.mark.parametrize(("start", "stop"), [(-1, 4), (0, 17), (9, 8)])
def test_rows_that_do_not_exist(tmp_path: Path, start: int, stop: int) -> None:
    save(tmp_path)
    with pytest.raises(FewbitsError, match=rf"rows {start} to {stop} of .*k_proj.weight do not exist: it has 16"):
        open_source(tmp_path).read_rows("model.layers.0.self_attn.k_proj.weight", start, stop)


def test_a_tensor_that_does_not_exist(tmp_path: Path) -> None:
    save(tmp_path)
    with pytest.raises(FewbitsError, match=r"has no tensor 'transformer.output_layer.weight'"):
        open_source(tmp_path).read("transformer.output_layer.weight")


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        (
            "quantization_bit",
            4,
            r"ChatGLM with quantization_bit=4 stores its weights in a few bits .*; use the model that",
        ),
        ("pre_seq_len", 128, r"pre_seq_len=128 puts a trained prefix before every text, .*; use a checkpoint with the"),
        ("rmsnorm", False, r"rmsnorm=False uses LayerNorm, where GLM has RMSNorm; use"),
        ("post_layer_norm", False, r"post_layer_norm=False has no norm after the last layer"),
        ("apply_residual_connection_post_layernorm", True, r"_post_layernorm=True takes the residual after the norm"),
        ("original_rope", False, r"original_rope=False rotates channels in another order"),
        ("add_bias_linear", True, r"add_bias_linear=True has biases that GLM has no place for"),
        ("multi_query_attention", False, r"multi_query_attention=False keeps query, key and value head by head"),
        ("multi_query_attention", "absent", r"multi_query_attention=None keeps query, key and value head by head"),
        ("multi_query_group_num", 3, r"multi_query_group_num=3 does not divide its 4 heads"),
        ("padded_vocab_size", "absent", r"padded_vocab_size=None is not of the architecture of ChatGLM2 and ChatGLM3"),
        ("padded_vocab_size", 151552, r"padded_vocab_size=151552 is GLM-4, .*; use THUDM/glm-4-9b-chat-hf"),
        ("quantization_config", {"bits": 4}, r"quantization_config={'bits': 4} is quantized already; give the model"),
        ("num_layers", 0, r"num_layers in config.json of a ChatGLM model must be a whole number above 0, but is 0"),
        ("hidden_size", "absent", r"hidden_size in config.json of a ChatGLM model must be a whole number .* is None"),
        ("layernorm_epsilon", "x", r"layernorm_epsilon in config.json is 'x', not a number above 0; fetch it again"),
        ("torch_dtype", "float17", r"torch_dtype in config.json is 'float17', no dtype; fetch it again"),
    ],
)
def test_variants_are_refused_by_name(tmp_path: Path, key: str, value: Any, message: str) -> None:
    save(tmp_path)
    config = CONFIG | {key: value}
    (tmp_path / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v != "absent"}))
    with pytest.raises(FewbitsError, match=message) as caught:
        open_source(tmp_path)
    assert str(caught.value).startswith(f"{tmp_path}: ")
    assert "\n" not in str(caught.value)


def test_a_missing_tensor(tmp_path: Path) -> None:
    tensors = save(tmp_path)
    tensors.pop(LAYER + "self_attention.query_key_value.bias")
    save_file(tensors, tmp_path / "model.safetensors")
    message = (
        r"1 tensors that its config.json asks for are not in the checkpoint, such as '.*query_key_value.bias'; fetch"
    )
    with pytest.raises(FewbitsError, match=message):
        load(tmp_path)


def test_a_fused_tensor_of_the_wrong_shape(tmp_path: Path) -> None:
    tensors = save(tmp_path)
    tensors[LAYER + "self_attention.query_key_value.weight"] = torch.ones(96, 32)
    save_file(tensors, tmp_path / "model.safetensors")
    message = (
        r"query_key_value.weight has 96 rows, but config.json asks for 64 \(32 of .*q_proj.weight, 16 of .*; fetch"
    )
    with pytest.raises(FewbitsError, match=message):
        load(tmp_path)


@pytest.mark.parametrize("name", ["self_attention.query_key_value.weight", "mlp.dense_h_to_4h.weight"])
def test_a_tensor_with_the_wrong_columns(tmp_path: Path, name: str) -> None:
    tensors = save(tmp_path)
    tensors[LAYER + name] = torch.ones(len(tensors[LAYER + name]), 31)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(FewbitsError, match=r"has shape \[\d+, 31\], the configuration wants \[\d+, 32\]"):
        load(tmp_path)


def test_an_unexpected_tensor_is_warned_of(tmp_path: Path) -> None:
    save_file(save(tmp_path) | {"transformer.extra.weight": torch.ones(3)}, tmp_path / "model.safetensors")
    with pytest.warns(UserWarning, match=r"1 tensors have no place in GlmForCausalLM"):
        load(tmp_path)


@pytest.mark.parametrize("stated", [None, {"eos_token_id": 2, "top_p": 0.8, "do_sample": True}])
def test_an_answer_ends_where_the_turn_ends(tmp_path: Path, stated: dict[str, Any] | None) -> None:
    save(tmp_path, padded_vocab_size=256)
    first = len(write_sentencepiece(tmp_path / "tokenizer.model"))
    assert open_source(tmp_path).config.vocab_size < first  # a stop beyond the vocabulary is none
    assert open_source(tmp_path).generation_config().eos_token_id == [2]
    save(tmp_path, padded_vocab_size=512)
    if stated is not None:
        (tmp_path / "generation_config.json").write_text(json.dumps(stated))
    config = open_source(tmp_path).generation_config()
    assert config.eos_token_id == [2, first + 6, first + 8]
    assert config.top_p == (None if stated is None else 0.8)
    assert load(tmp_path).generation_config.eos_token_id == config.eos_token_id


def test_chatglm2_ends_with_eos(tmp_path: Path) -> None:
    save(tmp_path, _name_or_path="THUDM/chatglm2-6b")
    write_sentencepiece(tmp_path / "tokenizer.model")
    assert open_source(tmp_path).generation_config().eos_token_id == 2
