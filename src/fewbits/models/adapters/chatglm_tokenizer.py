"""The tokenizer of ChatGLM2 and ChatGLM3: sentencepiece byte pairs, special tokens behind them, and the chat format.

The original puts special tokens into a prompt by their ids and never finds them in text. Here a prompt is rendered as
text first, so the tokenizer must find them again; yet what a user typed must stay text, be it `<|user|>` or `sop`.
Therefore the chat template puts a guard into such words of a message. No special token is found where a guard is, and
the normalizer, which runs afterwards, takes it out. All of that is in the template and `tokenizer.json`, so any reader
of the saved tokenizer gets the original's ids. Text that no template rendered has no guards: for it,
`split_special_tokens=True` does what the original does.

Source: `tokenization_chatglm.py` of https://huggingface.co/THUDM/chatglm3-6b and https://huggingface.co/THUDM/chatglm2-6b
"""

from pathlib import Path

from tokenizers import AddedToken, processors
from transformers import PreTrainedTokenizerBase, TokenizersBackend

from fewbits.models.adapters.sentencepiece_model import read_sentencepiece_model
from fewbits.models.adapters.sentencepiece_tokenizer import GUARD, byte_pair_tokenizer

COMMANDS = ("[MASK]", "[gMASK]", "[sMASK]", "sop", "eop")  # their ids follow those of the pieces
ROLES = ("<|system|>", "<|user|>", "<|assistant|>", "<|observation|>")  # and theirs follow, in ChatGLM3
_UNKNOWN, _END = "<unk>", "</s>"
_PREFIX = ("[gMASK]", "sop")
# As words only: "people" has an `eop` in it.
_WORDS = ("sop", "eop")

_PLAIN = """\
{%- macro plain(text) -%}
{%- set found = namespace(text=text) -%}
{%- for mark in ['<|', 'MASK]', '<unk>', '</s>'] -%}
{%- set found.text = found.text.replace(mark, mark[:-1] + 'GUARD' + mark[-1:]) -%}
{%- endfor -%}
{%- for word in ['sop', 'eop'] -%}
{%- set rest = found.text.split(word) -%}
{%- set found.text = rest[0] -%}
{%- for part in rest[1:] -%}
{%- set inside = found.text[-1:].isalpha() or part[:1].isalpha() -%}
{%- set found.text = found.text + (word if inside else word[:1] + 'GUARD' + word[1:]) + part -%}
{%- endfor -%}
{%- endfor -%}
{{- found.text -}}
{%- endmacro -%}
""".replace("GUARD", GUARD)

# "metadata\n" and the content are cut into tokens each by itself in the original, hence the space before the content.
_CHATGLM3 = """\
{{- '[gMASK]sop' -}}
{%- for message in messages -%}
{%- if message['role'] not in ['system', 'user', 'assistant', 'observation'] -%}
{{- raise_exception("ChatGLM3 knows the roles system, user, assistant and observation, not " + message['role']) -}}
{%- endif -%}
{%- set content = message['content'] -%}
{%- if message['role'] == 'system' and message['tools'] -%}
{%- set content = content + '\\n' + message['tools'] | tojson(indent=4) -%}
{%- endif -%}
{{- '<|' + message['role'] + '|>' + plain(message['metadata'] or '') + '\\n' -}}
{{- ' ' + plain(content) if content -}}
{%- endfor -%}
{{- '<|assistant|>' if add_generation_prompt -}}
"""

_CHATGLM2 = """\
{{- '[gMASK]sop' -}}
{%- set turns = namespace(asked=0) -%}
{%- for message in messages -%}
{%- if message['role'] == 'user' -%}
{%- set turns.asked = turns.asked + 1 -%}
{{- '[Round ' ~ turns.asked ~ ']\\n\\n问：' + plain(message['content']) + '\\n\\n答：' -}}
{%- elif message['role'] == 'assistant' -%}
{{- plain(message['content']) + ('' if loop.last else '\\n\\n') -}}
{%- else -%}
{{- raise_exception("ChatGLM2 knows the roles user and assistant, not " + message['role']) -}}
{%- endif -%}
{%- endfor -%}
"""


def chatglm_tokenizer(folder: Path, *, roles: bool) -> PreTrainedTokenizerBase:
    """Build the tokenizer from `tokenizer.model`.

    Text gets `[gMASK] sop` before it; padding is on the left.

    Args:
        folder: Where `tokenizer.model` lies.
        roles: Whether the model knows the tokens of roles, as ChatGLM3 does and ChatGLM2 does not.

    Raises:
        FewbitsError: There is no `tokenizer.model`, or it is not one of byte pairs.
    """
    commands = COMMANDS + ROLES * roles
    backend = byte_pair_tokenizer(read_sentencepiece_model(folder / "tokenizer.model"), commands)
    unknown, end, *others = (
        AddedToken(token, single_word=token in _WORDS, normalized=False, special=True)
        for token in (_UNKNOWN, _END, *commands)
    )
    backend.add_special_tokens([unknown, end, *others])
    prefix = " ".join(_PREFIX)
    backend.post_processor = processors.TemplateProcessing(
        single=f"{prefix} $A",
        pair=f"{prefix} $A $B {_END}",
        special_tokens=[(token, backend.token_to_id(token)) for token in (*_PREFIX, _END)],
    )
    return TokenizersBackend(
        tokenizer_object=backend,
        name_or_path=str(folder),
        unk_token=unknown,
        pad_token=unknown,
        eos_token=end,
        extra_special_tokens=others,
        padding_side="left",
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
        chat_template=_PLAIN + (_CHATGLM3 if roles else _CHATGLM2),
    )


def turn_ends(folder: Path) -> list[int]:
    """The ids of the tokens with which ChatGLM3 hands the turn over: to the user, or to a tool that is to be called."""
    first = len(read_sentencepiece_model(folder / "tokenizer.model").pieces)
    commands = COMMANDS + ROLES
    return [first + commands.index(token) for token in ("<|user|>", "<|observation|>")]
