"""The tokenizer of Baichuan and Baichuan2: sentencepiece byte pairs, and the chat format of the chat models.

A turn begins with the token of who speaks, named by its id in `generation_config.json`. In the vocabulary it is
`<reserved_106>` for the user and `<reserved_107>` for the assistant.

Source: `tokenization_baichuan.py` and `generation_utils.py` of https://huggingface.co/baichuan-inc/Baichuan2-7B-Chat
"""

from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, processors
from transformers import PreTrainedTokenizerBase, TokenizersBackend

from fewbits.errors import FewbitsError
from fewbits.models.adapters.raw_config import read_json
from fewbits.models.adapters.sentencepiece_model import (
    Piece,
    SentencePieceModel,
    read_sentencepiece_model,
)
from fewbits.models.adapters.sentencepiece_tokenizer import GUARD, byte_pair_tokenizer

_SPECIAL = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": None}
_SPEAKERS = ("user_token_id", "assistant_token_id")

_CHAT = """\
{%- for message in messages -%}
{%- set content = message['content'].replace('USER', 'PLAIN_USER').replace('ASSISTANT', 'PLAIN_ASSISTANT') -%}
{%- if message['role'] == 'system' and loop.first -%}
{{- content -}}
{%- elif message['role'] == 'user' -%}
{{- 'USER' + content -}}
{%- elif message['role'] == 'assistant' -%}
{{- 'ASSISTANT' + content -}}
{%- else -%}
{{- raise_exception("Baichuan knows the roles user, assistant and, first, system, not " + message['role']) -}}
{%- endif -%}
{%- endfor -%}
{{- 'ASSISTANT' if add_generation_prompt and messages[-1]['role'] != 'assistant' -}}
"""


def baichuan_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """Build the tokenizer from `tokenizer.model`, with what `tokenizer_config.json` says of special tokens.

    A model without tokens of speakers is no chat model, and has no chat template but one of its own.

    Raises:
        FewbitsError: There is no `tokenizer.model`, it is not one of byte pairs, or a special token is not in it.
    """
    model = read_sentencepiece_model(folder / "tokenizer.model")
    settings = read_json(folder / "tokenizer_config.json")
    special = {name: _text(settings.get(name, default)) for name, default in _SPECIAL.items()}
    speakers = _speakers(model, read_json(folder / "generation_config.json"))
    backend = byte_pair_tokenizer(model)
    _add_tokens(backend, model, [*filter(None, special.values()), *(piece.text for piece in speakers)])
    backend.post_processor = _frame(backend, settings, special)
    return TokenizersBackend(
        tokenizer_object=backend,
        name_or_path=str(folder),
        extra_special_tokens=[piece.text for piece in speakers],
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
        chat_template=_chat(*speakers) if speakers else settings.get("chat_template"),
        **special,
    )


def _text(token: Any) -> str | None:
    """A special token in `tokenizer_config.json`: its text, or an object that holds it."""
    content = token.get("content") if isinstance(token, dict) else token
    return content if isinstance(content, str) else None


def _speakers(model: SentencePieceModel, generation: dict[str, Any]) -> tuple[Piece, ...]:
    """The pieces that say that the user and that the assistant speaks, or none."""
    ids = [generation[key] for key in _SPEAKERS if key in generation]
    if len(ids) < len(_SPEAKERS):
        return ()
    if beyond := [index for index in ids if not isinstance(index, int) or not 0 <= index < len(model.pieces)]:
        raise FewbitsError(
            f"{model.path}: has {len(model.pieces)} tokens, but generation_config.json names a speaker by the id "
            f"{beyond[0]!r}; fetch both again"
        )
    return tuple(model.pieces[index] for index in ids)


def _add_tokens(backend: Tokenizer, model: SentencePieceModel, special: list[str]) -> None:
    """Make tokens special: found in text before anything else, and left out of what is decoded if so asked."""
    if unknown := [token for token in special if backend.token_to_id(token) is None]:
        raise FewbitsError(
            f"{model.path}: has no token {unknown[0]!r}, which tokenizer_config.json asks for; fetch both again"
        )
    backend.add_special_tokens([AddedToken(token, normalized=False) for token in special])


def _frame(
    backend: Tokenizer, settings: dict[str, Any], special: dict[str, str | None]
) -> processors.TemplateProcessing:
    """What goes before and after a text: nothing, in the published models."""
    before = [special["bos_token"]] if settings.get("add_bos_token", True) else []
    after = [special["eos_token"]] if settings.get("add_eos_token", False) else []
    text = [*filter(None, before), "$A", *filter(None, after)]
    return processors.TemplateProcessing(
        single=text,
        pair=text + [token.replace("$A", "$B") for token in text],
        special_tokens=[(token, backend.token_to_id(token)) for token in text if token != "$A"],
    )


def _chat(user: Piece, assistant: Piece) -> str:
    """The template; a speaker's token in a message is guarded, so that it becomes what sentencepiece makes of it."""
    result = _CHAT
    for name, piece in {"USER": user, "ASSISTANT": assistant}.items():
        guarded = piece.text[:1] + GUARD + piece.text[1:]
        result = result.replace(f"'PLAIN_{name}'", repr(guarded)).replace(f"'{name}'", repr(piece.text))
    return result
