"""Let a model answer a prompt, piece by piece as the text comes."""

from __future__ import annotations

from collections.abc import Callable

import torch
import transformers

from fewbits.errors import FewbitsError


def generate_text(
    model: transformers.PreTrainedModel,
    tokenizer: transformers.PreTrainedTokenizerBase,
    prompt: str,
    *,
    max_new_tokens: int = 256,
    temperature: float = 0.0,
    seed: int = 0,
    use_chat_template: bool = True,
    write: Callable[[str], None] | None = None,
) -> str:
    """Continue a prompt.

    Args:
        model: A causal language model.
        tokenizer: Its tokenizer.
        prompt: What the user says. The tokenizer's chat template is applied, if it has one.
        max_new_tokens: Most tokens to write.
        temperature: 0 takes the likeliest token each time; above, tokens are drawn from softmax(logits / temperature).
        seed: Of the draws.
        use_chat_template: False gives the model the prompt as it is.
        write: Called with each piece of text as it is final.

    Returns:
        The text written, without special tokens.

    Raises:
        FewbitsError: If the prompt is empty, or with what may be written is longer than the model's context.
    """
    if not prompt.strip():
        raise FewbitsError("prompt: it is empty; say something")
    inputs = _tokens(tokenizer, prompt, use_chat_template).to(model.device)
    length = inputs["input_ids"].shape[1]
    context = getattr(model.config, "max_position_embeddings", None)
    if context is not None and length + max_new_tokens > context:
        raise FewbitsError(
            f"prompt: {length} tokens and {max_new_tokens} new ones pass the model's context of {context}; shorten one"
        )
    sampling = {"do_sample": True, "temperature": temperature} if temperature > 0 else _GREEDY
    if temperature > 0:
        torch.manual_seed(seed)
    streamer = None if write is None else _Pieces(tokenizer, write)
    ids = model.generate(**inputs, max_new_tokens=max_new_tokens, streamer=streamer, **sampling)
    text: str = tokenizer.decode(ids[0, length:], skip_special_tokens=True)
    return text


# A checkpoint's own sampling settings would draw a warning beside do_sample=False.
_GREEDY = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}


def _tokens(
    tokenizer: transformers.PreTrainedTokenizerBase, prompt: str, use_chat_template: bool
) -> transformers.BatchEncoding:
    if use_chat_template and tokenizer.chat_template:
        messages = [{"role": "user", "content": prompt}]
        return tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
    return tokenizer(prompt, return_tensors="pt")


class _Pieces(transformers.TextStreamer):  # type: ignore[misc]  # transformers is not typed
    def __init__(self, tokenizer: transformers.PreTrainedTokenizerBase, write: Callable[[str], None]) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self._write = write

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        self._write(text)
