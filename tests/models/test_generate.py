"""Answers to a prompt: what is written piece by piece is what is returned."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import fewbits
from fewbits.errors import FewbitsError
from fewbits.models.generate import Pieces, check_prompt, context_length, generate_text
from models.tiny_gguf import TinyGguf


@pytest.fixture(scope="module")
def model(tiny_int8: Path) -> transformers.PreTrainedModel:
    return fewbits.AutoModelForCausalLM.from_pretrained(tiny_int8)


@pytest.fixture
def tokenizer(tiny_int8: Path) -> transformers.PreTrainedTokenizerBase:
    return fewbits.AutoTokenizer.from_pretrained(tiny_int8)


@pytest.fixture
def answer(model: Any, tokenizer: Any) -> Callable[..., str]:
    return lambda prompt, **options: generate_text(model, tokenizer, prompt, **({"max_new_tokens": 12} | options))


def test_pieces_make_the_text(answer: Callable[..., str]) -> None:
    pieces: list[str] = []
    text = answer("hello", write=pieces.append)
    assert "".join(pieces) == text == answer("hello")
    assert text
    assert "<|" not in text


def test_greedy_takes_the_likeliest_token(answer: Callable[..., str], model: Any, tokenizer: Any) -> None:
    ids = tokenizer("he", return_tensors="pt").input_ids
    for _ in range(12):
        ids = torch.cat([ids, model(ids).logits[:, -1].argmax(-1, keepdim=True)], 1)
        if ids[0, -1] == tokenizer.eos_token_id:
            break
    assert answer("he", use_chat_template=False) == tokenizer.decode(ids[0, 1:], skip_special_tokens=True)


def test_the_chat_template_is_applied(answer: Callable[..., str], tokenizer: Any) -> None:
    templated = answer("hello <|end|>")
    assert templated == answer("<|user|>hello <|end|><|end|>", use_chat_template=False)
    assert templated != answer("hello <|end|>", use_chat_template=False)
    tokenizer.chat_template = None
    assert answer("hello <|end|>") == answer("hello <|end|>", use_chat_template=False)


def test_draws_follow_the_seed(answer: Callable[..., str]) -> None:
    drawn = [answer("hello", temperature=2.0, seed=seed) for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert answer("hello", temperature=1e-4) == answer("hello"), "a cold draw is the likeliest token"


def test_tokens_are_counted(answer: Callable[..., str], model: Any, tokenizer: Any) -> None:
    used = []
    generate = model.generate
    model.generate = lambda **options: used.append(generate(**options)) or used[-1]
    try:
        answer("h", max_new_tokens=3, use_chat_template=False)
    finally:
        del model.generate
    assert used[0].shape[1] <= 1 + 3


@pytest.mark.parametrize("prompt", ["", " ", "\n\t"])
def test_an_empty_prompt_is_refused(answer: Callable[..., str], prompt: str) -> None:
    with pytest.raises(FewbitsError, match="prompt: it is empty; say something"):
        answer(prompt)


def test_the_context_is_the_limit(answer: Callable[..., str]) -> None:
    answer("x" * 120, max_new_tokens=8, use_chat_template=False)
    with pytest.raises(FewbitsError, match="prompt: 120 tokens and 9 new ones pass the model's context of 128"):
        answer("x" * 120, max_new_tokens=9, use_chat_template=False)


def test_the_default_is_what_the_context_leaves(answer: Callable[..., str], model: Any, tokenizer: Any) -> None:
    def limit(length: int) -> int:
        return check_prompt(model.config, tokenizer, "x" * length, use_chat_template=False)

    assert [limit(length) for length in (1, 120, 127)] == [127, 8, 1]
    assert answer("x" * 120, max_new_tokens=None, use_chat_template=False)
    with pytest.raises(FewbitsError, match="prompt: 128 tokens fill the model's context of 128; shorten it"):
        limit(128)


@pytest.mark.parametrize(
    ("config", "length"),
    [
        (transformers.LlamaConfig(max_position_embeddings=77), 77),
        (transformers.GPT2Config(n_positions=77), 77),
        (transformers.MptConfig(max_seq_len=77), 77),
        (transformers.BloomConfig(seq_length=77), 77),
        (transformers.PreTrainedConfig(max_sequence_length=77), 77),
        (transformers.PreTrainedConfig(n_ctx=77, max_position_embeddings=-1), 77),
        (transformers.Gemma3Config(text_config={"max_position_embeddings": 77}), 77),
        (transformers.PreTrainedConfig(), None),
    ],
    ids=lambda value: value.model_type or "none" if hasattr(value, "model_type") else str(value),
)
def test_context_lengths(config: transformers.PreTrainedConfig, length: int | None) -> None:
    assert context_length(config) == length


def test_without_a_known_context_nothing_is_refused(tokenizer: Any) -> None:
    config = transformers.PreTrainedConfig()
    assert check_prompt(config, tokenizer, "x" * 300) == 256
    assert check_prompt(config, tokenizer, "x" * 300, max_new_tokens=1000) == 1000


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (transformers.BertConfig(), "bert: a model of type 'bert' fills gaps in a text (an encoder)"),
        (transformers.RobertaConfig(), "roberta: a model of type 'roberta' fills gaps"),
        (transformers.BartConfig(), "bart: a model of type 'bart' rewrites its input (an encoder-decoder)"),
        (transformers.T5Config(), "t5: a model of type 't5' rewrites its input"),
    ],
    ids=lambda value: getattr(value, "model_type", ""),
)
def test_encoders_are_refused(tokenizer: Any, config: transformers.PreTrainedConfig, message: str) -> None:
    with pytest.raises(FewbitsError) as refused:
        check_prompt(config, tokenizer, "hello")
    assert str(refused.value).startswith(message)
    assert str(refused.value).endswith("give a causal one")


def test_an_encoder_that_was_trained_as_a_decoder_is_not(tokenizer: Any) -> None:
    assert check_prompt(transformers.BertConfig(is_decoder=True), tokenizer, "hello", max_new_tokens=5) == 5


def test_a_prompt_that_is_not_unicode(answer: Callable[..., str]) -> None:
    with pytest.raises(FewbitsError, match="prompt: character 3 is not Unicode; give the text in UTF-8"):
        answer("he\udcff")


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_pieces_are_whole_characters_and_lose_no_space(tmp_path: Path, kind: str) -> None:
    TinyGguf(tokenizer=kind).write(tmp_path / "tiny.gguf")
    tokenizer = fewbits.AutoTokenizer.from_pretrained(tmp_path / "tiny.gguf")
    ids = tokenizer("hello he\nhe  hello né 你好 🙂 end", add_special_tokens=False).input_ids
    written: list[str] = []
    pieces = Pieces(tokenizer, written.append)
    pieces.put(torch.tensor([[1, 2]]))  # the prompt
    for token in ids:
        pieces.put(torch.tensor([token]))
    pieces.end()
    assert "".join(written) == pieces.text == tokenizer.decode(ids)
    assert pieces.ids == ids
    assert {"é", "你", "🙂"} <= {piece.strip() for piece in written}
    assert "\ufffd" not in pieces.text


def test_a_character_cut_off_is_written_at_the_end(tokenizer: Any) -> None:
    pieces = Pieces(tokenizer)
    pieces.put(torch.tensor([[1]]))
    for token in tokenizer("a🙂", add_special_tokens=False).input_ids[:-1]:
        pieces.put(torch.tensor([token]))
    assert pieces.text == "a"
    pieces.end()
    assert pieces.text == "a\ufffd"
