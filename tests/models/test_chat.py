"""Conversations: what is said again is not computed again, and the answers are the same as if it were."""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import fewbits
from fewbits.errors import FewbitsError
from fewbits.models.chat import Conversation, check_chat
from test_end_to_end import MODEL

# Unlike the fixture's template this one opens the answer, so that the next prompt begins with all of this turn.
TURNS = (
    "{% for m in messages %}{{ '<|user|>' if m.role == 'user' else '<think>' if m.role == 'assistant' else '#' }}"
    "{{ m.content }}<|end|>{% endfor %}{% if add_generation_prompt %}<think>{% endif %}"
)
SAY = ("hello", "he said", "hel")


@pytest.fixture(scope="module")
def folder(save_tiny: Callable, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("chat")
    save_tiny(folder, dtype=torch.float32, eos_token_id=None)  # answers end at max_new_tokens
    return folder


@pytest.fixture(scope="module")
def model(folder: Path) -> transformers.PreTrainedModel:
    return fewbits.AutoModelForCausalLM.from_pretrained(folder)


@pytest.fixture
def tokenizer(folder: Path) -> transformers.PreTrainedTokenizerBase:
    return fewbits.AutoTokenizer.from_pretrained(folder)


@pytest.fixture
def talk(model: Any, tokenizer: Any) -> Callable[..., Conversation]:
    return lambda **options: Conversation(model, tokenizer, **({"max_new_tokens": 8, "temperature": 0} | options))


def without_reuse(conversation: Conversation, text: str) -> str:
    """The answer that the same conversation gives when it has no cache."""
    alone = copy.copy(conversation)
    alone._cache, alone._cached = None, []
    return alone.answer(text).text


@contextmanager
def tokens_read(model: torch.nn.Module) -> Iterator[list[int]]:
    """How many tokens each forward pass of the model reads."""
    read: list[int] = []
    hook = model.get_input_embeddings().register_forward_pre_hook(lambda _, args: read.append(args[0].shape[1]))
    try:
        yield read
    finally:
        hook.remove()


class InterruptAt:
    """Presses Ctrl-C the n-th time it is called."""

    def __init__(self, n: int) -> None:
        self.left = n

    def __call__(self, *_: object) -> None:
        self.left -= 1
        if self.left == 0:
            raise KeyboardInterrupt


def test_pieces_make_the_answer(talk: Callable[..., Conversation]) -> None:
    pieces: list[str] = []
    conversation = talk()
    answer = conversation.answer("hello", pieces.append)
    assert "".join(pieces) == answer.text
    assert len(pieces) > 3
    assert (answer.interrupted, answer.forgotten) == (False, 0)
    assert conversation.messages == [
        {"role": "user", "content": "hello"},
        {"role": "assistant", "content": answer.text},
    ]


def test_the_model_sees_all_turns(talk: Callable[..., Conversation], tokenizer: Any, model: Any) -> None:
    tokenizer.chat_template = TURNS
    conversation = talk(system="be brief")
    first = conversation.answer("hello").text
    second = conversation.answer("he").text
    prompt = f"#be brief<|end|><|user|>hello<|end|><think>{first}<|end|><|user|>he<|end|><think>"
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    written = model.generate(ids, max_new_tokens=8, do_sample=False)[0, ids.shape[1] :]
    assert second == tokenizer.decode(written, skip_special_tokens=True)


@pytest.mark.parametrize("template", [TURNS, None], ids=["extends", "diverges"])
def test_turns_are_not_read_again(
    talk: Callable[..., Conversation], tokenizer: Any, model: Any, template: str | None
) -> None:
    tokenizer.chat_template = template or tokenizer.chat_template
    conversation = talk()
    for text in SAY:
        expected = without_reuse(conversation, text)
        cached = list(conversation._cached)
        with tokens_read(model) as read:
            answer = conversation.answer(text).text
        assert answer == expected
        assert read[1:] == [1] * 7
        prompt = len(conversation._cached) - 7
        pairs = zip(cached, conversation._cached, strict=False)
        shared = next((i for i, (a, b) in enumerate(pairs) if a != b), len(cached))
        assert read[0] == prompt - shared
        assert (shared > 0) == (text != SAY[0])


def test_a_repeated_prompt_leaves_a_token_to_read(talk: Callable[..., Conversation], model: Any) -> None:
    conversation = talk()
    first = conversation.answer("hello").text
    conversation.messages = []
    with tokens_read(model) as read:
        assert conversation.answer("hello").text == first
    assert read[0] == 1


def test_a_sliding_window(save_tiny: Callable, tmp_path: Path) -> None:
    save_tiny(tmp_path, "mistral", dtype=torch.float32, eos_token_id=None, sliding_window=16)
    tokenizer = fewbits.AutoTokenizer.from_pretrained(tmp_path)
    model = fewbits.AutoModelForCausalLM.from_pretrained(tmp_path)
    for template in (TURNS, tokenizer.chat_template):  # the second needs a cut, which a window cannot give
        tokenizer.chat_template = template
        conversation = Conversation(model, tokenizer, max_new_tokens=8, temperature=0)
        for text in SAY:
            expected = without_reuse(conversation, text)
            assert conversation.answer(text).text == expected


def test_an_interrupt_keeps_what_was_said(talk: Callable[..., Conversation], tokenizer: Any) -> None:
    tokenizer.chat_template = TURNS
    conversation, whole = talk(max_new_tokens=24), talk(max_new_tokens=24).answer("hello").text
    answer = conversation.answer("hello", InterruptAt(3))
    assert answer.interrupted
    assert answer.text
    assert whole.startswith(answer.text)
    assert len(answer.text) < len(whole)
    assert conversation.messages[-1] == {"role": "assistant", "content": answer.text}
    assert conversation._cached, "the cache is kept"
    expected = without_reuse(conversation, "go on")
    after = conversation.answer("go on")
    assert (after.text, after.interrupted) == (expected, False)


@pytest.mark.parametrize("layer", [0, 1])
def test_an_interrupt_between_layers(talk: Callable[..., Conversation], tokenizer: Any, model: Any, layer: int) -> None:
    tokenizer.chat_template = TURNS
    conversation = talk()
    conversation.answer("hello")
    hook = model.model.layers[layer].mlp.register_forward_hook(InterruptAt(4))  # after this layer's cache was written
    try:
        assert conversation.answer("he").interrupted
    finally:
        hook.remove()
    lengths = {state.shape[-2] for kept in conversation._cache.layers for state in (kept.keys, kept.values)}
    assert lengths == {len(conversation._cached)}
    expected = without_reuse(conversation, "hel")
    assert conversation.answer("hel").text == expected


def test_an_interrupt_before_the_first_word_takes_the_question_back(
    talk: Callable[..., Conversation], model: Any
) -> None:
    conversation = talk()
    conversation.answer("hello")
    before = list(conversation.messages)
    hook = model.model.layers[1].register_forward_hook(InterruptAt(1))
    try:
        answer = conversation.answer("he")
    finally:
        hook.remove()
    assert (answer.text, answer.interrupted) == ("", True)
    assert conversation.messages == before
    expected = without_reuse(conversation, "hel")
    assert conversation.answer("hel").text == expected


def test_an_error_leaves_the_conversation_whole(talk: Callable[..., Conversation], model: Any) -> None:
    conversation = talk()
    conversation.answer("hello")
    before = list(conversation.messages)
    hook = model.model.layers[1].register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        conversation.answer("he")
    hook.remove()
    assert conversation.messages == before
    untroubled = talk()
    untroubled.answer("hello")
    assert conversation.answer("he").text == untroubled.answer("he").text


def test_draws_follow_the_seed(talk: Callable[..., Conversation]) -> None:
    def drawn(seed: int) -> list[str]:
        conversation = talk(temperature=1.5, seed=seed)
        torch.rand(seed)  # what others draw does not matter
        return [conversation.answer(text).text for text in ("hello", "hello")]

    assert drawn(1) == drawn(1) != drawn(2)
    assert len({*drawn(1)}) == 2


def test_reset_forgets(talk: Callable[..., Conversation]) -> None:
    conversation = talk(temperature=1.5)
    first = conversation.answer("hello").text
    conversation.answer("he")
    conversation.reset()
    assert conversation.messages == []
    assert conversation.answer("hello").text == first


def test_a_full_context_forgets_the_oldest_turns(talk: Callable[..., Conversation], tokenizer: Any, model: Any) -> None:
    tokenizer.chat_template = TURNS
    conversation = talk(system="be brief", max_new_tokens=20)
    forgotten = 0
    for turn in range(6):
        answer = conversation.answer(f"question {turn}")
        forgotten += answer.forgotten
        assert len(conversation._cached) <= model.config.max_position_embeddings
        assert conversation.messages[-2]["content"] == f"question {turn}"
        assert conversation.messages[0] == {"role": "user", "content": f"question {forgotten}"}
        assert len(conversation.messages) == 2 * (turn + 1 - forgotten)
    assert forgotten > 0
    expected = without_reuse(conversation, "well")
    assert conversation.answer("well").text == expected


def test_without_a_limit_an_answer_ends_with_the_context(talk: Callable[..., Conversation], model: Any) -> None:
    conversation = talk(max_new_tokens=None)
    conversation.answer("x" * 100)
    assert len(conversation._cached) == model.config.max_position_embeddings - 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (" \n", "message: it is empty; say something"),
        ("he\udcff", "message: character 3 is not Unicode; give the text in UTF-8"),
        ("x" * 119, "prompt: 121 tokens and 8 new ones pass the model's context of 128; shorten one"),
    ],
    ids=["empty", "surrogate", "long"],
)
def test_a_message_is_refused(talk: Callable[..., Conversation], text: str, message: str) -> None:
    conversation = talk()
    conversation.answer("hello")
    before = list(conversation.messages)
    with pytest.raises(FewbitsError) as refused:
        conversation.answer(text)
    assert str(refused.value) == message
    assert conversation.messages == before


def test_no_chat_template(talk: Callable[..., Conversation], tokenizer: Any) -> None:
    tokenizer.chat_template = None
    with pytest.raises(FewbitsError, match=r"the tokenizer has no chat template.*fewbits generate --raw") as refused:
        talk()
    assert str(refused.value).startswith(tokenizer.name_or_path)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (TURNS.replace("messages", "messages[-1:]"), "its chat template ignores a system prompt; say it in a message"),
        ("{{ raise_exception('no system!') }}", "refuses the messages: no system!; leave the system prompt out"),
        ("{% if %}", "the chat template refuses the messages: .*; leave the system prompt out"),
    ],
    ids=["ignored", "refused", "broken"],
)
def test_a_template_without_system_prompt(
    talk: Callable[..., Conversation], tokenizer: Any, template: str, message: str
) -> None:
    tokenizer.chat_template = template
    with pytest.raises(FewbitsError, match=message):
        talk(system="be brief")


def test_a_template_that_refuses_all(talk: Callable[..., Conversation], tokenizer: Any) -> None:
    tokenizer.chat_template = "{{ raise_exception('tools only') }}"
    with pytest.raises(FewbitsError, match="tools only; fewbits generate --raw needs none"):
        talk()


def test_an_empty_system_prompt(talk: Callable[..., Conversation]) -> None:
    with pytest.raises(FewbitsError, match="system prompt: it is empty"):
        talk(system="")


def test_a_limit_that_never_fits(talk: Callable[..., Conversation]) -> None:
    with pytest.raises(FewbitsError, match=r"prompt: 3 tokens and 126 new ones pass the model's context of 128"):
        talk(max_new_tokens=126)


def test_an_encoder(tokenizer: Any) -> None:
    with pytest.raises(FewbitsError, match="bert: a model of type 'bert' fills gaps in a text"):
        check_chat(transformers.BertConfig(), tokenizer)


@pytest.mark.slow
@pytest.mark.skipif(not MODEL.exists(), reason=f"{MODEL} is absent: make demo fetches it")
def test_a_real_model_knows_the_turn_before() -> None:
    model = fewbits.AutoModelForCausalLM.from_pretrained(MODEL, precision="fp32")
    tokenizer = fewbits.AutoTokenizer.from_pretrained(MODEL)
    conversation = Conversation(model, tokenizer, max_new_tokens=24, temperature=0)
    assert "Paris" in conversation.answer("What is the capital of France?").text
    question = "In which country is that city?"
    expected = without_reuse(conversation, question)
    with tokens_read(model) as read:
        answer = conversation.answer(question).text
    assert answer == expected
    assert "France" in answer
    assert read[0] < 30, "the first turn was read again"
