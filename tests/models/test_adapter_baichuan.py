"""Baichuan2-7B under transformers' Llama: fused W_pack, normalized head, tokenizer and chat format."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import save_file
from tiny_sentencepiece import CONTROL, USER_DEFINED, write_sentencepiece

import fewbits
from fewbits.errors import FewbitsError
from fewbits.models.safetensors_folder import SafetensorsFolder
from fewbits.models.source import open_source

EPS = torch.finfo(torch.float32).eps
IDS = torch.arange(5, 45).view(2, 20)
CONFIG: dict[str, Any] = {
    "model_type": "baichuan",
    "architectures": ["BaichuanForCausalLM"],
    "auto_map": {"AutoConfig": "configuration_baichuan.C", "AutoModelForCausalLM": "modeling_baichuan.M"},
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "hidden_act": "silu",
    "hidden_size": 32,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
    "model_max_length": 64,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
    "vocab_size": 384,
    "z_loss_weight": 0,
}
SPEAKERS = ("<reserved_106>", "<reserved_107>")
PACKED = "model.layers.1.self_attn.W_pack.weight"
load = fewbits.AutoModelForCausalLM.from_pretrained


def save(folder: Path, *, dtype: torch.dtype = torch.float32, **changes: Any) -> dict[str, torch.Tensor]:
    """Write a tiny Baichuan2 with random weights under the published names."""
    config = CONFIG | {"torch_dtype": str(dtype).removeprefix("torch.")} | changes
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps({key: value for key, value in config.items() if value != "absent"}))
    (folder / "modeling_baichuan.py").write_text("raise SystemExit('remote code was run')")
    torch.manual_seed(0)
    hidden, wide = 32, 48
    shapes = {
        "model.embed_tokens.weight": (384, hidden),
        "model.norm.weight": (hidden,),
        "lm_head.weight": (384, hidden),
    }
    for layer in range(2):
        names = {
            "input_layernorm": (hidden,),
            "self_attn.W_pack": (3 * hidden, hidden),
            "self_attn.o_proj": (hidden, hidden),
            "post_attention_layernorm": (hidden,),
            "mlp.gate_proj": (wide, hidden),
            "mlp.up_proj": (wide, hidden),
            "mlp.down_proj": (hidden, wide),
        }
        shapes |= {f"model.layers.{layer}.{name}.weight": shape for name, shape in names.items()}
    tensors = {name: (torch.randn(shape) * 0.3 + ("norm" in name)).to(dtype) for name, shape in shapes.items()}
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    save_file(tensors, folder / "model.safetensors")
    return tensors


def equations(w: dict[str, torch.Tensor], *, normalized: bool = True) -> torch.Tensor:
    """The original's forward pass, written down once more in float64."""
    w = {name: tensor.double() for name, tensor in w.items()}
    length = IDS.shape[1]
    heads, channels = 4, 8
    angles = torch.outer(torch.arange(length), 1e4 ** -(torch.arange(0, channels, 2).double() / channels))
    turn = torch.polar(torch.ones_like(angles), angles)[:, None]
    causal = torch.full((length, length), -torch.inf).triu(1).double()

    def norm(x: torch.Tensor, gain: torch.Tensor) -> torch.Tensor:
        return x * (x.pow(2).mean(-1, keepdim=True) + 1e-6).rsqrt() * gain

    def rotate(x: torch.Tensor) -> torch.Tensor:  # channel c with channel c + 4
        turned = torch.complex(x[..., :4], x[..., 4:]) * turn
        return torch.cat([turned.real, turned.imag], -1)

    x = w["model.embed_tokens.weight"][IDS]
    for layer in range(2):
        p = f"model.layers.{layer}."
        packed = norm(x, w[p + "input_layernorm.weight"]) @ w[p + "self_attn.W_pack.weight"].T
        q, k, v = packed.unflatten(-1, (3, heads, channels)).unbind(2)
        scores = torch.einsum("bqhd,bkhd->bhqk", rotate(q), rotate(k)) / channels**0.5 + causal
        mixed = torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), v).flatten(2)
        x = x + mixed @ w[p + "self_attn.o_proj.weight"].T
        y = norm(x, w[p + "post_attention_layernorm.weight"])
        gate = torch.nn.functional.silu(y @ w[p + "mlp.gate_proj.weight"].T)
        x = x + (gate * (y @ w[p + "mlp.up_proj.weight"].T)) @ w[p + "mlp.down_proj.weight"].T
    head = w["lm_head.weight"]
    if normalized:
        head = head / head.pow(2).sum(-1, keepdim=True).sqrt()
    return norm(x, w["model.norm.weight"]) @ head.T


def error(got: torch.Tensor, wanted: torch.Tensor) -> float:
    """The largest difference, in eps of the largest logit."""
    return float((got - wanted).abs().max() / wanted.abs().max() / EPS)


def logits(model: Any, **inputs: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS, **inputs).logits


@pytest.mark.parametrize("first", [False, True], ids=["Baichuan2-7B", "Baichuan-7B"])
def test_the_logits_are_those_of_the_equations(tmp_path: Path, first: bool) -> None:
    tensors = save(tmp_path, architectures=["BaiChuanForCausalLM" if first else "BaichuanForCausalLM"])
    model = load(tmp_path, trust_remote_code=True)  # which is not needed, and does not happen
    assert type(model) is transformers.LlamaForCausalLM
    assert error(logits(model), equations(tensors, normalized=not first).float()) <= 64


def test_the_first_is_also_known_by_its_vocabulary(tmp_path: Path) -> None:
    tensors = save(tmp_path, vocab_size=64_000)
    assert torch.equal(open_source(tmp_path).read("lm_head.weight"), tensors["lm_head.weight"])


def test_int8_is_near_the_equations(tmp_path: Path) -> None:
    expected = equations(save(tmp_path)).float()
    assert 1e-4 < error(logits(load(tmp_path, load_in_8bit=True)), expected) * EPS < 0.1


def test_generation_with_and_without_cache(tmp_path: Path) -> None:
    save(tmp_path)
    model = load(tmp_path)
    options = {"attention_mask": torch.ones_like(IDS), "max_new_tokens": 12, "do_sample": False, "eos_token_id": None}
    cached = model.generate(IDS, use_cache=True, **options)
    assert cached.shape == (2, 32)
    assert torch.equal(cached, model.generate(IDS, use_cache=False, **options))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_rows_of_the_head_have_length_one(tmp_path: Path, dtype: torch.dtype) -> None:
    stored = save(tmp_path, dtype=dtype)["lm_head.weight"]
    source = open_source(tmp_path)
    head = source.read("lm_head.weight")
    assert head.dtype == dtype
    assert torch.equal(head, torch.nn.functional.normalize(stored.float()).to(dtype))
    assert torch.equal(source.read_rows("lm_head.weight", 100, 107), head[100:107])


def test_a_head_of_many_rows_is_normalized_throughout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stored = save(tmp_path)["lm_head.weight"]
    monkeypatch.setattr("fewbits.models.adapters.baichuan._CHUNK", 7 * 32)
    assert torch.equal(open_source(tmp_path).read("lm_head.weight"), torch.nn.functional.normalize(stored))


def test_a_zero_row_of_the_head_stays_zero(tmp_path: Path) -> None:
    tensors = save(tmp_path)
    tensors["lm_head.weight"][7] = 0
    save_file(tensors, tmp_path / "model.safetensors")
    assert not logits(load(tmp_path))[..., 7].any()


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_a_converted_folder_is_read_by_stock_transformers(tmp_path: Path, precision: str) -> None:
    save(tmp_path / "model")
    save_tokenizer(tmp_path / "model")
    folder = fewbits.convert(tmp_path / "model", tmp_path / "out", precision).path
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    assert type(theirs) is transformers.LlamaForCausalLM
    assert error(logits(theirs), logits(load(tmp_path / "model"))) <= (0 if precision == "fp32" else 0.2 / EPS)
    ours, saved = (cls.from_pretrained(path) for cls, path in (
        (fewbits.AutoTokenizer, tmp_path / "model"), (transformers.AutoTokenizer, folder)))  # fmt: skip
    messages = [{"role": "user", "content": "hello<reserved_106></s> 你好"}]
    assert saved.apply_chat_template(messages) == ours.apply_chat_template(messages)
    assert saved(["<reserved_9>hello world"]) == ours(["<reserved_9>hello world"])


def test_a_part_is_read_from_its_own_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = save(tmp_path)
    source = open_source(tmp_path)
    monkeypatch.setattr(SafetensorsFolder, "read", None)
    assert torch.equal(source.read("model.layers.1.self_attn.q_proj.weight"), tensors[PACKED][:32])
    assert torch.equal(source.read("model.layers.1.self_attn.k_proj.weight"), tensors[PACKED][32:64])
    assert torch.equal(source.read_rows("model.layers.1.self_attn.v_proj.weight", 1, 3), tensors[PACKED][65:67])
    assert not any("inv_freq" in name or "W_pack" in name for name in source.tensors)


# Of the published configuration of Baichuan2-13B: it has model_max_length and no max_position_embeddings.
THIRTEEN = {"max_position_embeddings": "absent", "model_max_length": 4096, "hidden_size": 5120, "num_hidden_layers": 40}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            THIRTEEN,
            r"Baichuan with max_position_embeddings=None is a 13B model: its positions are ALiBi, .*; use Baichuan2",
        ),
        ({"tie_word_embeddings": True}, r"tie_word_embeddings=True is no published model: they have an output head"),
        ({"quantization_config": {"bits": 4}}, r"quantization_config={'bits': 4} is quantized already; give the model"),
        ({"num_attention_heads": 5}, r"hidden_size=32 cannot be shared among its 5 heads; fetch config.json again"),
        (
            {"vocab_size": "x"},
            r"vocab_size in config.json of a Baichuan model must be a whole number .*, but is 'x'; fetch",
        ),
    ],
)
def test_variants_are_refused_by_name(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    save(tmp_path, **changes)
    with pytest.raises(FewbitsError, match=message):
        open_source(tmp_path)


def test_a_missing_tensor(tmp_path: Path) -> None:
    tensors = save(tmp_path)
    tensors.pop(PACKED)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(
        FewbitsError, match=r"1 tensors that its config.json asks for are not .*'.*W_pack.weight'; fetch"
    ):
        load(tmp_path)


def test_a_packed_tensor_of_the_wrong_shape(tmp_path: Path) -> None:
    tensors = save(tmp_path)
    tensors[PACKED] = torch.ones(95, 32)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(FewbitsError, match=r"W_pack.weight has 95 rows, but config.json asks for 96 \(32 of .*q_proj"):
        load(tmp_path)


def save_tokenizer(folder: Path, *, kind: int = USER_DEFINED, dummy_prefix: bool = True, **settings: Any) -> list[str]:
    """Write a tokenizer in the layout of Baichuan2-Chat; returns its pieces."""
    folder.mkdir(exist_ok=True)
    symbols = [*SPEAKERS, "<reserved_9>", "<reserved_90>"]
    pieces = write_sentencepiece(folder / "tokenizer.model", symbols=symbols, kind=kind, dummy_prefix=dummy_prefix)
    token = {"__type": "AddedToken", "content": "</s>", "lstrip": False}
    settings = {"add_bos_token": False, "eos_token": token, "pad_token": "<unk>", "bos_token": "<s>"} | settings
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "generation_config.json").write_text(json.dumps({"user_token_id": 3, "assistant_token_id": 4}))
    return pieces


def tokenizer_of(folder: Path) -> transformers.PreTrainedTokenizerBase:
    if not (folder / "config.json").is_file():
        save(folder)
    return fewbits.AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize("dummy_prefix", [True, False])
@pytest.mark.parametrize("kind", [USER_DEFINED, CONTROL])
def test_the_cuts_are_sentencepieces(tmp_path: Path, kind: int, dummy_prefix: bool) -> None:
    sentencepiece = pytest.importorskip("sentencepiece")
    save_tokenizer(tmp_path, kind=kind, dummy_prefix=dummy_prefix)
    theirs = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))
    ours = tokenizer_of(tmp_path)
    texts = ["hello world", " hello  你好世界\n", "a<reserved_9>hello", "<reserved_90><reserved_9> world", "😀aaaa", ""]
    for text in texts:
        assert ours(text).input_ids == theirs.encode(text), text
        assert ours.decode(theirs.encode(text)) == theirs.decode(theirs.encode(text))
    # As the original builds a prompt: the speaker's id, then what sentencepiece makes of the message by itself.
    messages = [
        {"role": "system", "content": "hello"},
        {"role": "user", "content": "what <reserved_107> 你好"},
        {"role": "assistant", "content": ""},
        {"role": "user", "content": "<reserved_106>"},
    ]
    expected: list[int] = []
    for message in messages:
        speaker = {"system": [], "user": [3], "assistant": [4]}[message["role"]]
        expected += speaker + theirs.encode(message["content"])
    got = ours.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert got == [*expected, 4]


def test_special_tokens(tmp_path: Path) -> None:
    save_tokenizer(tmp_path)
    tokenizer = tokenizer_of(tmp_path)
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 0)
    assert set(SPEAKERS) <= set(tokenizer.all_special_tokens)
    messages = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "你好世界 <|/"}]
    ids = tokenizer.apply_chat_template(messages, return_dict=False)
    assert tokenizer.decode(ids, skip_special_tokens=True) == "hello 你好世界 <|/"
    assert tokenizer.decode(tokenizer("é <x> 😀").input_ids) == "é <x> 😀"


@pytest.mark.parametrize(("begin", "end"), [(True, False), (True, True), (False, False)])
def test_bos_and_eos_are_added_as_the_settings_say(tmp_path: Path, begin: bool, end: bool) -> None:
    save_tokenizer(tmp_path, add_bos_token=begin, add_eos_token=end)
    tokens = tokenizer_of(tmp_path).convert_ids_to_tokens(tokenizer_of(tmp_path)("hello").input_ids)
    assert tokens == ["<s>"] * begin + ["▁hello"] + ["</s>"] * end
    pair = tokenizer_of(tmp_path)("hello", "hello").input_ids
    assert len(pair) == 2 * len(tokens)


def test_a_base_model_has_no_chat_template(tmp_path: Path) -> None:
    save_tokenizer(tmp_path)
    (tmp_path / "generation_config.json").unlink()
    assert tokenizer_of(tmp_path).chat_template is None


def test_an_unknown_role_is_refused(tmp_path: Path) -> None:
    save_tokenizer(tmp_path)
    with pytest.raises(Exception, match="Baichuan knows the roles user, assistant and, first, system, not tool"):
        tokenizer_of(tmp_path).apply_chat_template([{"role": "tool", "content": "hello"}])


def test_a_speaker_beyond_the_vocabulary(tmp_path: Path) -> None:
    save_tokenizer(tmp_path)
    (tmp_path / "generation_config.json").write_text(json.dumps({"user_token_id": 3, "assistant_token_id": 5000}))
    with pytest.raises(FewbitsError, match=r"tokenizer.model: has \d+ tokens, but .* by the id 5000; fetch both again"):
        tokenizer_of(tmp_path)


def test_a_special_token_that_is_not_in_the_vocabulary(tmp_path: Path) -> None:
    save_tokenizer(tmp_path, pad_token="<pad>")
    with pytest.raises(FewbitsError, match=r"has no token '<pad>', which tokenizer_config.json asks for; fetch both"):
        tokenizer_of(tmp_path)


def test_a_tokenizer_config_that_is_no_json(tmp_path: Path) -> None:
    save_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(FewbitsError, match=r"tokenizer_config.json: is not JSON \(.*\); fetch it again"):
        tokenizer_of(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("[]")
    with pytest.raises(FewbitsError, match=r"tokenizer_config.json: is not a JSON object; fetch it again"):
        tokenizer_of(tmp_path)
