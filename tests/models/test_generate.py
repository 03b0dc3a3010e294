"""Answers to a prompt: what is written piece by piece is what is returned."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import fewbits
from fewbits.errors import FewbitsError
from fewbits.models.generate import generate_text


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
