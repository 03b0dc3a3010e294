"""A conversation: turns that a model answers in order, each going on from the keys and values of those before."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from inspect import signature
from typing import Any

import torch
import transformers
from jinja2 import TemplateError  # a dependency of torch, and what transformers renders templates with
from transformers.cache_utils import DynamicLayer

from fewbits.errors import FewbitsError
from fewbits.models.generate import (
    Pieces,
    Write,
    answer_limit,
    check_text,
    check_writes_text,
    context_length,
    name_of,
    sampling,
)

Message = dict[str, str]
"""`{"role": "user" | "assistant" | "system", "content": text}`, as chat templates read it."""

_NEW_TOKENS = 1024


@dataclass(frozen=True)
class Answer:
    """What came of one turn.

    Attributes:
        text: What the model said, without special tokens.
        interrupted: Whether it was stopped before its end.
        forgotten: How many old turns were dropped, because the context was full.
    """

    text: str
    interrupted: bool
    forgotten: int


class Conversation:
    """A model with what was said so far.

    The same model, options and questions give the same answers. What the cache holds of earlier turns is used again as
    far as the tokens agree. `messages` are the turns that the model still sees, question and answer by turns, without
    the system prompt.
    """

    def __init__(
        self,
        model: transformers.PreTrainedModel,
        tokenizer: transformers.PreTrainedTokenizerBase,
        *,
        system: str | None = None,
        max_new_tokens: int | None = None,
        temperature: float = 0.7,
        seed: int = 0,
    ) -> None:
        """Begin a conversation.

        Args:
            model: A causal language model.
            tokenizer: Its tokenizer, with a chat template.
            system: What the model is told before the first turn and never forgets.
            max_new_tokens: Most tokens in one answer; None: 1024, or as many as the context leaves.
            temperature: 0 takes the likeliest token; above, tokens are drawn from softmax(logits / temperature).
            seed: Of the draws; each turn has its own, derived from it.

        Raises:
            FewbitsError: As `check_chat`.
        """
        check_chat(model.config, tokenizer, system=system, max_new_tokens=max_new_tokens)
        self.system = system
        self.messages: list[Message] = []
        self._model, self._tokenizer = model, tokenizer
        self._max_new_tokens, self._temperature, self._seed = max_new_tokens, temperature, seed
        self._context = context_length(model.config)
        self._can_reuse = _takes_cache(model)
        self.reset()

    def reset(self) -> None:
        """Forget all turns."""
        self.messages = []
        self._turn = 0
        self._cache: Any = None  # transformers' Cache of the tokens in _cached
        self._cached: list[int] = []

    def answer(self, text: str, write: Write | None = None) -> Answer:
        """Say something and let the model answer.

        A KeyboardInterrupt ends the answer, not the conversation: what was said until then stays in it. Interrupted
        before the first word, the question is taken back.

        Args:
            text: What the user says.
            write: Called with each piece of the answer as it is final.

        Raises:
            FewbitsError: If the text is empty, not Unicode, or longer than the model's context.
        """
        check_text("message", text)
        kept, ids = self._prompt({"role": "user", "content": text})
        limit = answer_limit(len(ids), self._context, self._max_new_tokens, default=_NEW_TOKENS)
        forgotten = (len(self.messages) - len(kept) + 1) // 2
        pieces, interrupted = Pieces(self._tokenizer, write), False
        cache, reused = self._take_cache(ids)
        self._turn += 1
        try:
            self._generate(ids, cache, limit, pieces)
        except KeyboardInterrupt:
            interrupted = True
            pieces.end()
        # The last token was chosen but not yet read by the model.
        self._keep_cache(cache, [*ids, *pieces.ids][:-1] if pieces.ids else ids[:reused], torn=interrupted)
        if interrupted and not pieces.text:
            return Answer("", interrupted=True, forgotten=0)
        self.messages = [*kept, {"role": "assistant", "content": pieces.text}]
        return Answer(pieces.text, interrupted, forgotten)

    def _generate(self, ids: list[int], cache: Any, limit: int, pieces: Pieces) -> None:
        tokens = torch.tensor([ids], device=self._model.device)
        past = {} if cache is None else {"past_key_values": cache}
        self._model.generate(
            tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=limit, streamer=pieces, **past,
            **sampling(self._temperature, self._seed + self._turn - 1),
        )  # fmt: skip

    def _prompt(self, question: Message) -> tuple[list[Message], list[int]]:
        """The question after as many of the last turns as leave room for an answer, and its tokens."""
        kept = [*self.messages, question]
        ids = _tokens(self._tokenizer, self.system, kept)
        if self._context is not None:
            room = self._max_new_tokens or min(_NEW_TOKENS, self._context // 2)
            while len(kept) > 1 and len(ids) + room > self._context:
                kept = kept[2:]
                ids = _tokens(self._tokenizer, self.system, kept)
        return kept, ids

    def _take_cache(self, ids: list[int]) -> tuple[Any, int]:
        """A cache with the first tokens of `ids` (all but the last, whose logits are needed, at most); their number.

        None for a model that keeps its state otherwise. Whatever happens until `_keep_cache`, no half-written cache is
        left behind.
        """
        cache, cached, self._cache, self._cached = self._cache, self._cached, None, []
        shared = min(_shared(cached, ids), len(ids) - 1)
        if cache is not None and (shared == len(cached) or _cut(cache, shared)):
            return cache, shared
        new = transformers.DynamicCache(config=self._model.config.get_text_config()) if self._can_reuse else None
        return new, 0

    def _keep_cache(self, cache: Any, ids: list[int], *, torn: bool) -> None:
        """Keep a cache of these tokens; one that an interrupt left torn between its layers is cut to them."""
        if cache is not None and (_cut(cache, len(ids)) if torn else cache.get_seq_length() == len(ids)):
            self._cache, self._cached = cache, ids


def check_chat(
    config: transformers.PreTrainedConfig,
    tokenizer: transformers.PreTrainedTokenizerBase,
    *,
    system: str | None = None,
    max_new_tokens: int | None = None,
) -> None:
    """Find out, before any weight is read, whether one can talk with a model.

    Raises:
        FewbitsError: If the model is an encoder, has no chat template or one that takes no system prompt where one is
            given, or if its context is too short.
    """
    check_writes_text(config)
    name = tokenizer.name_or_path or name_of(config)
    if not tokenizer.chat_template:
        raise FewbitsError(
            f"{name}: the tokenizer has no chat template, so the model was not trained to converse; "
            "let it continue a text: fewbits generate --raw"
        )
    probe = [{"role": "user", "content": "?"}]
    if system is not None:
        check_text("system prompt", system)
        if _tokens(tokenizer, system, probe) == _tokens(tokenizer, None, probe):
            raise FewbitsError(f"{name}: its chat template ignores a system prompt; say it in a message")
    length = len(_tokens(tokenizer, system, probe))
    answer_limit(length, context_length(config), max_new_tokens, default=_NEW_TOKENS)


def _tokens(
    tokenizer: transformers.PreTrainedTokenizerBase, system: str | None, messages: Sequence[Message]
) -> list[int]:
    told = [] if system is None else [{"role": "system", "content": system}]
    try:
        encoded = tokenizer.apply_chat_template([*told, *messages], add_generation_prompt=True, return_dict=True)
    except TemplateError as error:  # templates refuse what they do not take, each in its own words
        remedy = "fewbits generate --raw needs none" if system is None else "leave the system prompt out"
        raise FewbitsError(f"the chat template refuses the messages: {error}; {remedy}") from error
    ids: list[int] = encoded["input_ids"]
    return ids


def _takes_cache(model: transformers.PreTrainedModel) -> bool:
    """Whether a model can go on from a DynamicCache; Mamba, RWKV and the like have states of their own."""
    named = "past_key_values" in signature(model.forward).parameters
    return named and model._supports_default_dynamic_cache()


def _shared(one: Sequence[int], other: Sequence[int]) -> int:
    """How many tokens two sequences begin with alike."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((index for index, (a, b) in pairs if a != b), min(len(one), len(other)))


def _cut(cache: transformers.DynamicCache, length: int) -> bool:
    """Cut a cache to its first tokens; False, and nothing done, where a layer does not hold each token by itself.

    Layers of sliding windows and of linear attention do not, once they are full.
    """
    layers = cache.layers
    if not all(isinstance(layer, DynamicLayer) and not layer.is_sliding and layer.is_initialized for layer in layers):
        return False
    # Keys and values each: an interrupt can come between the two.
    if any(min(layer.keys.shape[-2], layer.values.shape[-2]) < length for layer in layers):
        return False
    for layer in layers:
        if layer.keys.shape == layer.values.shape:
            layer.crop(length - layer.keys.shape[-2])
        else:
            layer.keys, layer.values = layer.keys[..., :length, :], layer.values[..., :length, :]
    return True
