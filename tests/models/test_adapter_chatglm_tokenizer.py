"""ChatGLM's tokenizer and chat format, built from `tokenizer.model`: the original's ids, also after saving."""

import json
import random
from pathlib import Path
from typing import Any

import pytest
import transformers
from tiny_chatglm import SHARED, needs_original, save
from tiny_sentencepiece import NORMAL, write_sentencepiece

import fewbits
from fewbits.errors import FewbitsError
from fewbits.models.adapters.chatglm_tokenizer import COMMANDS, ROLES, chatglm_tokenizer

Messages = list[dict[str, Any]]
HARD: Messages = [
    {"role": "system", "content": "Be <|user|>\n kind. 你好", "tools": [{"name": "天气"}]},
    {"role": "user", "content": ""},
    {"role": "assistant", "metadata": "get_weather", "content": "  people, a sop sop,sop. eop"},
    {"role": "observation", "content": "[gMASK][MASK]<a|></s><unk>"},
    {"role": "user", "content": "<|assistant|>sophisticated 😀"},
]


@pytest.fixture(scope="module")
def original() -> transformers.PreTrainedTokenizerBase:
    return chatglm_tokenizer(SHARED, roles=True)


@pytest.fixture(scope="module")
def reloaded(
    original: transformers.PreTrainedTokenizerBase, tmp_path_factory: pytest.TempPathFactory
) -> transformers.PreTrainedTokenizerBase:
    folder = tmp_path_factory.mktemp("saved")
    original.save_pretrained(folder)
    assert not list(folder.glob("*.py"))
    return transformers.AutoTokenizer.from_pretrained(folder)


@pytest.fixture
def tiny(tmp_path: Path) -> transformers.PreTrainedTokenizerBase:
    write_sentencepiece(tmp_path / "tokenizer.model")
    return chatglm_tokenizer(tmp_path, roles=True)


def chat(tokenizer: transformers.PreTrainedTokenizerBase, messages: Messages, *, ask: bool = False) -> list[int]:
    return tokenizer.apply_chat_template(messages, add_generation_prompt=ask, return_dict=False)


def built(tokenizer: transformers.PreTrainedTokenizerBase, messages: Messages) -> list[int]:
    """As the original builds a prompt: role, "metadata\\n" and content each by itself, their text never special."""

    def encode(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False, split_special_tokens=True).input_ids

    ids = tokenizer.convert_tokens_to_ids(["[gMASK]", "sop"])
    for message in messages:
        content = message["content"]
        if message["role"] == "system" and "tools" in message:
            content += "\n" + json.dumps(message["tools"], indent=4, ensure_ascii=False)
        ids += [tokenizer.convert_tokens_to_ids(f"<|{message['role']}|>")]
        ids += encode(message.get("metadata", "") + "\n") + encode(content)
    return ids


@needs_original
@pytest.mark.parametrize("which", ["original", "reloaded"])
@pytest.mark.parametrize(
    ("text", "ids"),
    [
        ("Precision is a budget.", [64790, 64792, 22617, 1255, 323, 260, 4194, 30930]),
        ("精度是预算。", [64790, 64792, 30910, 42038, 54532, 34691, 31155]),
    ],
)
def test_the_originals_ids(request: pytest.FixtureRequest, which: str, text: str, ids: list[int]) -> None:
    assert request.getfixturevalue(which)(text).input_ids == ids


@needs_original
@pytest.mark.parametrize("which", ["original", "reloaded"])
def test_the_originals_prompt(request: pytest.FixtureRequest, which: str) -> None:
    expected = [64790, 64792, 64795, 30910, 13, 1266, 323, 368, 30947, 30939, 30978, 30987, 64796]
    messages = [{"role": "user", "content": "What is FP16?"}]
    assert chat(request.getfixturevalue(which), messages, ask=True) == expected


@needs_original
@pytest.mark.parametrize("which", ["original", "reloaded"])
def test_the_originals_special_tokens(request: pytest.FixtureRequest, which: str) -> None:
    tokenizer = request.getfixturevalue(which)
    names = [*COMMANDS, *ROLES]
    assert tokenizer.convert_tokens_to_ids(names) == list(range(64789, 64798))
    assert tokenizer.convert_ids_to_tokens(list(range(64789, 64798))) == names
    assert set(names) <= set(tokenizer.all_special_tokens)
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.padding_side) == (0, 2, "left")
    assert len(tokenizer) == 64798


@needs_original
def test_the_cuts_are_sentencepieces(original: transformers.PreTrainedTokenizerBase) -> None:
    sentencepiece = pytest.importorskip("sentencepiece")
    theirs = sentencepiece.SentencePieceProcessor(model_file=str(SHARED / "tokenizer.model"))
    draw = random.Random(0)
    pieces = [theirs.id_to_piece(index).replace("▁", " ") for index in range(259, theirs.get_piece_size())]
    others = [" ", "   ", "\n", "\t", "a", "=", "—", "人", "😀", "\u0416", "\u0301", "<|user|>", "sop", "1000"]
    for _ in range(1500):
        text = "".join(draw.choice(pieces if draw.random() < 0.5 else others) for _ in range(draw.randint(1, 20)))
        ids = original(text, add_special_tokens=False, split_special_tokens=True).input_ids
        assert ids == theirs.encode(text), text
        assert original.decode(ids) == theirs.decode(ids) == text


@pytest.mark.parametrize("which", [pytest.param("original", marks=needs_original), "tiny"])
def test_a_prompt_is_built_as_by_the_original(request: pytest.FixtureRequest, which: str) -> None:
    tokenizer = request.getfixturevalue(which)
    assert chat(tokenizer, HARD) == built(tokenizer, HARD)
    assert chat(tokenizer, HARD, ask=True)[-1] == tokenizer.convert_tokens_to_ids("<|assistant|>")


@needs_original
def test_a_saved_prompt_is_built_as_by_the_original(
    original: transformers.PreTrainedTokenizerBase, reloaded: transformers.PreTrainedTokenizerBase
) -> None:
    assert chat(reloaded, HARD) == built(original, HARD)


@pytest.mark.parametrize("typed", [*ROLES, *COMMANDS, "</s>", "<unk>", "a sop.", "(eop)", "sop eop sop", "[gMASK]sop"])
def test_what_a_user_types_stays_text(tiny: transformers.PreTrainedTokenizerBase, typed: str) -> None:
    messages = [{"role": "user", "content": typed}]
    ids = chat(tiny, messages)
    special = [index for index in ids if index in tiny.all_special_ids]
    assert tiny.convert_ids_to_tokens(special) == ["[gMASK]", "sop", "<|user|>"]
    assert ids == built(tiny, messages)
    assert tiny.decode(ids, skip_special_tokens=True) == f"\n {typed}"


def test_an_ordinary_prompt_has_no_guards(tiny: transformers.PreTrainedTokenizerBase) -> None:
    text = tiny.apply_chat_template(
        [{"role": "user", "content": "sophisticated people, philosophy: a < b"}],
        add_generation_prompt=True,
        tokenize=False,
    )
    assert text == "[gMASK]sop<|user|>\n sophisticated people, philosophy: a < b<|assistant|>"


def test_words_with_a_command_in_them_stay_whole(tiny: transformers.PreTrainedTokenizerBase) -> None:
    assert tiny.convert_ids_to_tokens(tiny("people").input_ids) == ["[gMASK]", "sop", "▁people"]


def test_decoding(tiny: transformers.PreTrainedTokenizerBase) -> None:
    text = "hello 你好世界\n\t😀 é <x>"
    ids = tiny(text).input_ids
    assert tiny.decode(ids, skip_special_tokens=True) == text
    assert tiny.decode(ids[2:]) == text
    assert "<0xF0>" in tiny.convert_ids_to_tokens(ids)
    assert tiny.decode([*ids, tiny.eos_token_id], skip_special_tokens=True) == text


def test_a_batch_is_padded_on_the_left(tiny: transformers.PreTrainedTokenizerBase) -> None:
    batch = tiny(["hello", "hello world"], padding=True)
    assert batch["attention_mask"] == [[0, 1, 1, 1], [1, 1, 1, 1]]
    assert batch["input_ids"][0][0] == tiny.pad_token_id == 0
    assert set(batch) == {"input_ids", "attention_mask"}


def test_a_pair_ends_with_eos(tiny: transformers.PreTrainedTokenizerBase) -> None:
    tokens = tiny.convert_ids_to_tokens(tiny("hello", "hello").input_ids)
    assert tokens == ["[gMASK]", "sop", "▁hello", "▁hello", "</s>"]


def test_an_unknown_role_is_refused(tiny: transformers.PreTrainedTokenizerBase) -> None:
    with pytest.raises(Exception, match="ChatGLM3 knows the roles system, user, assistant and observation, not critic"):
        chat(tiny, [{"role": "critic", "content": "hello"}])


def test_chatglm2_has_rounds_and_no_roles(tmp_path: Path) -> None:
    save(tmp_path)
    write_sentencepiece(tmp_path / "tokenizer.model")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"name_or_path": "THUDM/chatglm2-6b"}))
    tokenizer = fewbits.AutoTokenizer.from_pretrained(tmp_path)
    messages = [
        {"role": "user" if turn % 2 == 0 else "assistant", "content": text}
        for turn, text in enumerate(["a", "b", "c", "sop"])
    ]
    prompt = "[Round 1]\n\n问：a\n\n答：b\n\n[Round 2]\n\n问：c\n\n答："
    assert chat(tokenizer, messages[:3], ask=True) == tokenizer(prompt).input_ids
    assert tokenizer.convert_ids_to_tokens(chat(tokenizer, messages)).count("sop") == 1
    assert "<|user|>" not in tokenizer.get_vocab()
    with pytest.raises(Exception, match="ChatGLM2 knows the roles user and assistant, not system"):
        chat(tokenizer, [{"role": "system", "content": "hello"}])


def test_a_missing_tokenizer(tmp_path: Path) -> None:
    save(tmp_path)
    with pytest.raises(FewbitsError, match=r"has no tokenizer.model; copy it from where the weights came from"):
        fewbits.AutoTokenizer.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"IQ== 0\nIg== 1\n",
        b"\x0a\x05\x0a\x01a\x18\x09",
        b"\x0a\xff\xff\xff\x7f",
        b"\x0a\x02\x18\x01",
        b"\xff" * 40,
    ],
    ids=["empty", "tiktoken", "kind", "cut off", "no text", "varint"],
)
def test_a_file_that_is_no_sentencepiece_model(tmp_path: Path, content: bytes) -> None:
    save(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(content)
    with pytest.raises(FewbitsError, match=r"tokenizer.model: is not a sentencepiece model; fetch it again"):
        fewbits.AutoTokenizer.from_pretrained(tmp_path)


def test_a_sentencepiece_model_of_another_type(tmp_path: Path) -> None:
    write_sentencepiece(tmp_path / "tokenizer.model", algorithm=1)
    with pytest.raises(FewbitsError, match=r"is a sentencepiece model of type 1; read are byte pairs, 2: use the"):
        chatglm_tokenizer(tmp_path, roles=True)


def test_a_token_with_two_ids(tmp_path: Path) -> None:
    write_sentencepiece(tmp_path / "tokenizer.model", symbols=["sop"], kind=NORMAL)
    with pytest.raises(FewbitsError, match=r"the token 'sop' has two ids; fetch the file again"):
        chatglm_tokenizer(tmp_path, roles=True)
