import os
import time
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as T
from tiny_gguf import PIECES, SIZES, TEMPLATE, TOKENS, TinyGguf, tiny_config
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from fewbits.errors import FewbitsError
from fewbits.models.gguf_parser import read_gguf_header
from fewbits.models.gguf_rope import llama3_frequency_factors
from fewbits.models.source import StoredTensor, open_source

DEMO = Path("~/.cache/fewbits/SmolLM2-135M-Instruct.Q4_1.gguf").expanduser()
TEXTS = ["hello  hell\n\n<|user|>hi<|end|>", "", " é漢🎉\t12345 don't", "<think>he</think>"]
# Block types that gguf dequantizes, found by trying: the point is that none is missing here.
BLOCK_TYPES = []
for kind, (block, block_bytes) in gguf.GGML_QUANT_SIZES.items():
    if block > 1 and kind.name not in ("Q8_1", "Q8_K"):  # intermediate results of matrix products, never stored
        try:
            gguf.dequantize(np.zeros((1, block_bytes), np.uint8), kind)
        except NotImplementedError:
            continue
        BLOCK_TYPES.append(kind)


@pytest.mark.parametrize("architecture", ["llama", "mistral", "qwen2", "qwen3"])
@pytest.mark.parametrize("tied", [False, True])
def test_weights_are_those_that_were_written(tmp_path: Path, architecture: str, tied: bool) -> None:
    tiny = TinyGguf(architecture, tiny_config(architecture, tie_word_embeddings=tied))
    expected = tiny.write(tmp_path / "tiny.gguf")
    source = open_source(tmp_path / "tiny.gguf")
    if tied:
        del expected["lm_head.weight"]
    assert source.tensors.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(source.read(name), tensor), name
        assert source.tensors[name] == StoredTensor(name, tuple(tensor.shape), "F32", 4 * tensor.numel())


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("kind", [T.Q8_0, T.BF16])
def test_weights_and_config_are_those_of_transformers(tmp_path: Path, architecture: str, kind: T) -> None:
    TinyGguf(architecture, type=kind).write(tmp_path / "tiny.gguf")
    source = open_source(tmp_path / "tiny.gguf")
    config = AutoConfig.from_pretrained(tmp_path, gguf_file="tiny.gguf")
    theirs, ours = config.to_dict(), source.config.to_dict()
    # transformers' table has no head size for qwen3 (ours comes from attention.key_length), nor dtype and architectures
    for key in {*theirs, *ours} - {"dtype", "architectures", "_name_or_path"} - ({"head_dim"} & {*ours}):
        assert theirs.get(key) == ours.get(key), key
    if architecture == "qwen3":
        return  # and so transformers cannot load this file's weights
    model = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="tiny.gguf", dtype=torch.float32)
    for name, tensor in model.state_dict().items():
        assert torch.equal(source.read(name).float(), tensor), name


@pytest.mark.parametrize(("kind", "dtype"), [(T.F16, torch.float16), (T.BF16, torch.bfloat16), (T.F32, torch.float32)])
def test_plain_types_keep_their_dtype(tmp_path: Path, kind: T, dtype: torch.dtype) -> None:
    expected = TinyGguf(type=kind).write(tmp_path / "tiny.gguf")
    source = open_source(tmp_path / "tiny.gguf")
    assert source.config.dtype == dtype
    for name, tensor in expected.items():
        if tensor.ndim == 2:
            assert source.tensors[name].stored_as == kind.name
            assert torch.equal(source.read(name), tensor.to(dtype)), name


@pytest.mark.parametrize("kind", BLOCK_TYPES, ids=lambda kind: kind.name)
def test_every_block_type_is_read_as_gguf_reads_it(tmp_path: Path, kind: T) -> None:
    config = tiny_config(hidden_size=256, vocab_size=300)
    raw = {"token_embd.weight": kind, "blk.0.attn_q.weight": kind}
    TinyGguf(config=config, raw=raw).write(tmp_path / "tiny.gguf")
    stored = {tensor.name: tensor for tensor in gguf.GGUFReader(tmp_path / "tiny.gguf").tensors}
    source = open_source(tmp_path / "tiny.gguf")
    assert source.config.dtype == torch.bfloat16
    with np.errstate(all="ignore"):
        embedding = gguf.dequantize(stored["token_embd.weight"].data, kind)
        query = gguf.dequantize(stored["blk.0.attn_q.weight"].data, kind)
    query = query.reshape(4, 32, 2, 256).swapaxes(1, 2).reshape(256, 256)
    np.testing.assert_array_equal(source.read("model.embed_tokens.weight").numpy(), embedding)
    np.testing.assert_array_equal(source.read("model.layers.0.self_attn.q_proj.weight").numpy(), query)
    assert source.tensors["model.embed_tokens.weight"].stored_as == kind.name


@pytest.mark.parametrize("kind", [T.F32, T.BF16, T.Q8_0])
@pytest.mark.parametrize(
    "name", ["model.embed_tokens.weight", "model.layers.1.self_attn.k_proj.weight", "model.norm.weight"]
)
def test_rows_are_the_rows_of_the_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: T, name: str) -> None:
    monkeypatch.setattr("fewbits.models.gguf_file._CHUNK", 256)  # several chunks even for a tiny matrix
    TinyGguf(type=kind).write(tmp_path / "tiny.gguf")
    source = open_source(tmp_path / "tiny.gguf")
    whole = source.read(name)
    for start, stop in [(0, len(whole)), (0, 1), (7, 9), (5, 31), (len(whole) - 1, len(whole)), (4, 4)]:
        assert torch.equal(source.read_rows(name, start, stop), whole[start:stop])


def test_llama_with_attention_biases_undoes_their_permutation_too(tmp_path: Path) -> None:
    tiny = TinyGguf(config=tiny_config(attention_bias=True))
    torch.manual_seed(1)
    tiny.tensors = {"blk.0.attn_q.bias": torch.randn(64).numpy()}
    tiny.write(tmp_path / "tiny.gguf")
    source = open_source(tmp_path / "tiny.gguf")
    assert source.config.attention_bias
    expected = tiny.tensors["blk.0.attn_q.bias"].reshape(4, 8, 2).swapaxes(1, 2).reshape(64)
    np.testing.assert_array_equal(source.read("model.layers.0.self_attn.q_proj.bias").numpy(), expected)


@pytest.mark.parametrize(
    ("architecture", "tokenizer"),
    [
        ("llama", "gpt2"),
        ("llama", "llama"),
        ("mistral", "gpt2"),
        ("mistral", "llama"),
        ("qwen2", "gpt2"),
        ("qwen3", "gpt2"),
    ],
)
def test_tokenizer_is_that_of_transformers_and_survives_saving(
    tmp_path: Path, architecture: str, tokenizer: str
) -> None:
    TinyGguf(architecture, tokenizer=tokenizer).write(tmp_path / "tiny.gguf")
    source = open_source(tmp_path / "tiny.gguf")
    source.config.save_pretrained(tmp_path / "saved")
    source.tokenizer().save_pretrained(tmp_path / "saved")
    ours = [source.tokenizer(), AutoTokenizer.from_pretrained(tmp_path / "saved")]
    theirs = AutoTokenizer.from_pretrained(tmp_path, gguf_file="tiny.gguf")
    count = len(TOKENS if tokenizer == "gpt2" else PIECES)  # theirs adds <|endoftext|>, for which the model has no row
    vocabulary = {token: index for token, index in theirs.get_vocab().items() if index < count}
    for tok in ours:
        for text in TEXTS:
            ids = theirs(text).input_ids
            assert tok(text).input_ids == ids
            assert tok.decode(ids) == theirs.decode(ids)
        assert tok.get_vocab() == vocabulary
        assert tok.chat_template == theirs.chat_template == TEMPLATE
        assert tok.special_tokens_map == theirs.special_tokens_map
        assert tok.all_special_ids == theirs.all_special_ids
    assert str(tmp_path) not in (tmp_path / "saved" / "tokenizer_config.json").read_text()


def test_generation_config_ends_at_the_end_of_text_and_of_a_turn(tmp_path: Path) -> None:
    TinyGguf(metadata={"tokenizer.ggml.eot_token_id": 257}).write(tmp_path / "tiny.gguf")
    generation = open_source(tmp_path / "tiny.gguf").generation_config()
    assert generation is not None
    assert (generation.bos_token_id, generation.eos_token_id, generation.pad_token_id) == (259, [258, 257], 258)


def test_llama3_frequencies_become_rope_parameters(tmp_path: Path) -> None:
    factors = llama3_frequency_factors(500_000.0, 16, 8.0).astype(np.float32)
    config = tiny_config(rope_parameters={"rope_type": "default", "rope_theta": 500_000.0})
    TinyGguf(config=config, tensors={"rope_freqs.weight": factors}).write(tmp_path / "tiny.gguf")
    source = open_source(tmp_path / "tiny.gguf")
    assert source.config.rope_parameters == {
        "rope_type": "llama3",
        "rope_theta": 500_000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    assert "rope_freqs.weight" not in source.tensors
    model = AutoModelForCausalLM.from_config(source.config)
    plain = 500_000.0 ** -(np.arange(0, 16, 2) / 16)
    np.testing.assert_allclose(model.model.rotary_emb.inv_freq.numpy(), plain / factors, rtol=1e-5)


def test_rotary_scaling_is_read(tmp_path: Path) -> None:
    keys = {"llama.rope.scaling.type": "yarn", "llama.rope.scaling.factor": 4.0}
    TinyGguf(metadata=keys | {"llama.rope.scaling.original_context_length": 32}).write(tmp_path / "tiny.gguf")
    rope = open_source(tmp_path / "tiny.gguf").config.rope_parameters
    assert (rope["rope_type"], rope["factor"], rope["original_max_position_embeddings"]) == ("yarn", 4.0, 32)


def test_head_size_and_vocabulary_come_from_where_they_stand(tmp_path: Path) -> None:
    config = tiny_config(head_dim=32)
    tiny = TinyGguf(config=config, metadata={"llama.attention.key_length": 32}, without=("llama.vocab_size",))
    tiny.write(tmp_path / "tiny.gguf")
    source = open_source(tmp_path / "tiny.gguf")
    assert source.config.head_dim == 32
    assert source.config.vocab_size == config.vocab_size
    assert source.tensors["model.layers.0.self_attn.q_proj.weight"].shape == (128, SIZES["hidden_size"])


def test_size_is_the_file_and_path_the_path(tmp_path: Path) -> None:
    TinyGguf().write(tmp_path / "tiny.gguf")
    source = open_source(os.fspath(tmp_path / "tiny.gguf"))
    assert source.path == tmp_path / "tiny.gguf"
    assert source.size == source.path.stat().st_size


def test_a_gguf_file_is_known_by_its_magic_too(tmp_path: Path) -> None:
    TinyGguf().write(tmp_path / "tiny.bin")
    assert "model.norm.weight" in open_source(tmp_path / "tiny.bin").tensors


def test_reading_what_is_not_there_is_refused(tmp_path: Path) -> None:
    TinyGguf().write(tmp_path / "tiny.gguf")
    source = open_source(tmp_path / "tiny.gguf")
    with pytest.raises(FewbitsError, match=r"tiny.gguf: has no tensor 'nothing'"):
        source.read("nothing")
    with pytest.raises(FewbitsError, match=r"rows 60 to 65 of model.norm.weight do not exist: it has 64"):
        source.read_rows("model.norm.weight", 60, 65)


@pytest.mark.slow
@pytest.mark.skipif(not DEMO.exists(), reason="the demo model is not in the cache: run `make demo`")
def test_the_demo_model() -> None:
    start = time.perf_counter()
    read_gguf_header(DEMO)
    assert time.perf_counter() - start < 0.3  # seconds; 0.02 on an idle core
    source = open_source(DEMO)
    assert len(source.tensors) == 272
    assert source.tensors["model.embed_tokens.weight"] == StoredTensor(
        "model.embed_tokens.weight", (49152, 576), "Q8_0", 49152 * 576 // 32 * 34
    )
    stored = {tensor.name: tensor for tensor in gguf.GGUFReader(DEMO).tensors}
    down = gguf.dequantize(stored["blk.7.ffn_down.weight"].data, T.Q4_1)
    np.testing.assert_array_equal(source.read("model.layers.7.mlp.down_proj.weight").numpy(), down)
    tokenizer = source.tokenizer()
    assert tokenizer.decode(tokenizer("Paris is 100% été 漢字").input_ids) == "Paris is 100% été 漢字"
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False)
    assert chat.endswith("<|im_start|>user\nhi<|im_end|>\n")
