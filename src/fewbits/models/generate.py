"""Let a model answer a prompt, piece by piece as the text comes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers.generation.streamers import BaseStreamer

from fewbits.errors import FewbitsError

Write = Callable[[str], None]
"""Called with each piece of text as it is final."""

_NEW_TOKENS = 256
# What families call their context length, the commonest name first.
_CONTEXT_NAMES = (
    "max_position_embeddings", "n_positions", "seq_length", "max_sequence_length", "max_seq_len", "n_ctx",
)  # fmt: skip


def generate_text(
    model: transformers.PreTrainedModel,
    tokenizer: transformers.PreTrainedTokenizerBase,
    prompt: str,
    *,
    max_new_tokens: int | None = None,
    temperature: float = 0.0,
    seed: int = 0,
    use_chat_template: bool = True,
    write: Write | None = None,
) -> str:
    """Continue a prompt.

    Args:
        model: A causal language model.
        tokenizer: Its tokenizer.
        prompt: What the user says. The tokenizer's chat template is applied, if it has one.
        max_new_tokens: Most tokens to write; None: 256, or as many as the context leaves.
        temperature: 0 takes the likeliest token each time; above, tokens are drawn from softmax(logits / temperature).
        seed: Of the draws.
        use_chat_template: False gives the model the prompt as it is.
        write: Called with each piece of text as it is final.

    Returns:
        The text written, without special tokens.

    Raises:
        FewbitsError: As `check_prompt`.
    """
    limit = check_prompt(
        model.config, tokenizer, prompt, max_new_tokens=max_new_tokens, use_chat_template=use_chat_template
    )
    inputs = _tokens(tokenizer, prompt, use_chat_template).to(model.device)
    streamer = None if write is None else Pieces(tokenizer, write)
    ids = model.generate(**inputs, max_new_tokens=limit, streamer=streamer, **sampling(temperature, seed))
    text: str = tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return text


def check_prompt(
    config: transformers.PreTrainedConfig,
    tokenizer: transformers.PreTrainedTokenizerBase,
    prompt: str,
    *,
    max_new_tokens: int | None = None,
    use_chat_template: bool = True,
) -> int:
    """Find out, before any weight is read, whether a model can answer a prompt.

    Returns:
        The most tokens to write.

    Raises:
        FewbitsError: If the model is an encoder, if the prompt is empty or not Unicode, or if it is longer than the
            model's context, alone or with the new tokens asked for.
    """
    check_writes_text(config)
    check_text("prompt", prompt)
    length = _tokens(tokenizer, prompt, use_chat_template)["input_ids"].shape[1]
    return answer_limit(length, context_length(config), max_new_tokens, default=_NEW_TOKENS)


def check_writes_text(config: transformers.PreTrainedConfig) -> None:
    """Refuse an encoder: transformers would put a language head on it, and what that writes is noise.

    Raises:
        FewbitsError: If it is one.
    """
    kind = None
    if getattr(config, "is_encoder_decoder", False):
        kind = "rewrites its input (an encoder-decoder)"
    elif type(config) in transformers.MODEL_FOR_MASKED_LM_MAPPING and not getattr(config, "is_decoder", True):
        kind = "fills gaps in a text (an encoder) and cannot continue one"
    if kind is not None:
        raise FewbitsError(f"{name_of(config)}: a model of type {config.model_type!r} {kind}; give a causal one")


def check_text(what: str, text: str) -> None:
    """Refuse a text that says nothing or that no tokenizer can read (lone surrogates, from bytes not in UTF-8).

    Raises:
        FewbitsError: If it is so.
    """
    if not text.strip():
        raise FewbitsError(f"{what}: it is empty; say something")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise FewbitsError(f"{what}: character {error.start + 1} is not Unicode; give the text in UTF-8") from error


def answer_limit(length: int, context: int | None, asked: int | None, *, default: int) -> int:
    """The most tokens to write after `length` tokens of prompt: those asked for, or a default that fits.

    Raises:
        FewbitsError: If the context is too short.
    """
    if context is None:
        return asked or default
    if asked is None and length < context:
        return min(default, context - length)
    if asked is None:
        raise FewbitsError(f"prompt: {length} tokens fill the model's context of {context}; shorten it")
    if length + asked > context:
        raise FewbitsError(
            f"prompt: {length} tokens and {asked} new ones pass the model's context of {context}; shorten one"
        )
    return asked


def context_length(config: transformers.PreTrainedConfig) -> int | None:
    """Tokens that a model sees at most, prompt and answer together; None where its configuration does not say."""
    text = config.get_text_config()
    for name in _CONTEXT_NAMES:
        length = getattr(text, name, None)
        if isinstance(length, int) and length > 0:  # -1 stands for no limit
            return length
    return None


def name_of(config: transformers.PreTrainedConfig) -> str:
    """What messages call a model: where it is, or its type."""
    return str(config.name_or_path or config.model_type)


def sampling(temperature: float, seed: int) -> dict[str, Any]:
    """How the next token is chosen, in transformers' keywords; seeds torch where tokens are drawn."""
    if temperature > 0:
        torch.manual_seed(seed)
        return {"do_sample": True, "temperature": temperature}
    # A checkpoint's own sampling settings would draw a warning beside do_sample=False.
    return {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}


def _tokens(
    tokenizer: transformers.PreTrainedTokenizerBase, prompt: str, use_chat_template: bool
) -> transformers.BatchEncoding:
    if use_chat_template and tokenizer.chat_template:
        messages = [{"role": "user", "content": prompt}]
        return tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
    return tokenizer(prompt, return_tensors="pt")


class Pieces(BaseStreamer):  # type: ignore[misc]  # transformers is not typed
    """Turns new tokens into pieces of text that are final, and keeps both.

    A token is decoded together with the piece before it, since some tokenizers drop a space at the start of what they
    decode; and held back while it ends inside a character, which byte-level tokens do.
    """

    def __init__(self, tokenizer: transformers.PreTrainedTokenizerBase, write: Write | None = None) -> None:
        self.ids: list[int] = []
        self.text = ""
        self._tokenizer, self._write = tokenizer, write
        self._prompt_came = False
        self._before = self._shown = 0  # ids[before:shown] is the last piece

    def put(self, value: Tensor) -> None:
        """Take the prompt (the first call, ignored), then token by token."""
        if self._prompt_came:
            self.ids += value.tolist()
            self._show(incomplete=False)
        self._prompt_came = True

    def end(self) -> None:
        """Write what is left, though it may end inside a character."""
        self._show(incomplete=True)

    def _show(self, *, incomplete: bool) -> None:
        old = self._decode(self.ids[self._before : self._shown])
        new = self._decode(self.ids[self._before :])
        piece = new[len(old) :]
        if piece and (incomplete or not new.endswith("\N{REPLACEMENT CHARACTER}")):
            self._before, self._shown = self._shown, len(self.ids)
            self.text += piece
            if self._write is not None:
                self._write(piece)

    def _decode(self, ids: list[int]) -> str:
        text: str = self._tokenizer.decode(ids, skip_special_tokens=True)
        return text
