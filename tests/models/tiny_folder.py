"""Tiny Hugging Face folders with random weights and a tokenizer: what the tests of layouts convert."""

from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GemmaTokenizer,
    GenerationConfig,
    LlamaTokenizer,
    PreTrainedTokenizerBase,
    TokenizersBackend,
)
from transformers.convert_slow_tokenizer import bytes_to_unicode
from transformers.tokenization_utils_base import generate_merges

SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "vocab_size": 320,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "initializer_range": 0.2,  # so that a misplaced row shows in the logits
}
HEADS = {"qwen3": {"head_dim": 32}, "gemma3_text": {"head_dim": 32, "query_pre_attn_scalar": 32, "sliding_window": 16}}
TEMPLATE = "{% for message in messages %}<|user|>{{ message['content'] }}<|end|>{% endfor %}"
TEXTS = ["hello  hell\n\n<|user|>hi<|end|>", "", " é漢🎉\t12345 don't", "<think>he</think> 1234", "(HELLOhe) he'Ll"]

_SPLITS = {
    "llama-bpe": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+",
    "qwen2": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+",
    "gpt-4o": r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
}


def byte_level_tokenizer(pre: str = "smollm", **settings: Any) -> PreTrainedTokenizerBase:
    """A byte-level BPE tokenizer that cuts text as the named family's own `tokenizer.json` does."""
    letters = list(bytes_to_unicode().values())
    merges = ["h e", "l l", "he ll", "1 2", "12 3", "123 4", "Ġ he", "Ċ Ċ", "( he", "H E"]
    tokens = ["<pad>", "<s>", "<|end|>", *letters, *[merge.replace(" ", "") for merge in merges], "<|user|>"]
    bpe = models.BPE(
        {token: index for index, token in enumerate(tokens)},
        [tuple(merge.split(" ")) for merge in merges],
        ignore_merges=pre == "llama-bpe",
    )
    backend = Tokenizer(bpe)
    backend.pre_tokenizer = _pre_tokenizer(pre)
    backend.normalizer = normalizers.NFC() if pre == "qwen2" else None
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<pad>", "<s>", "<|end|>", "<|user|>"])
    backend.add_tokens([AddedToken("<think>", normalized=False)])
    special = {"bos_token": "<s>", "eos_token": "<|end|>", "pad_token": "<pad>"}
    return TokenizersBackend(tokenizer_object=backend, chat_template=TEMPLATE, **(special | settings))


def _pre_tokenizer(pre: str) -> pre_tokenizers.PreTokenizer:
    if pre == "gpt-2":
        return pre_tokenizers.ByteLevel(add_prefix_space=False)
    if pre == "smollm":
        digits = pre_tokenizers.Digits(individual_digits=True)
        return pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    split = pre_tokenizers.Split(Regex(_SPLITS.get(pre, pre)), behavior="isolated")
    return pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def sentencepiece_tokenizer(kind: type = LlamaTokenizer, **settings: Any) -> PreTrainedTokenizerBase:
    """A sentencepiece tokenizer as Llama's or Gemma's, with bytes to fall back on."""
    words = ["▁h", "he", "▁he", "ll", "hell", "hello", "▁hello", "12", "▁▁"]
    tokens = ["<pad>", "<s>", "</s>", "<unk>", *[f"<0x{byte:02X}>" for byte in range(256)]]
    tokens += ["▁", *"helo12345'", *words]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    merges = generate_merges(vocabulary, {word: -float(index) for index, word in enumerate(words)})
    special = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    tokenizer = kind(vocab=vocabulary, merges=merges, chat_template=TEMPLATE, **(special | settings))
    tokenizer.add_special_tokens({"extra_special_tokens": ["<|user|>", "<|end|>"]})
    return tokenizer


def default_tokenizer(model_type: str) -> PreTrainedTokenizerBase:
    """The kind of tokenizer that models of a type have."""
    if model_type == "mistral":
        return sentencepiece_tokenizer(add_bos_token=True)
    if model_type == "phi3":
        tokenizer = sentencepiece_tokenizer(add_bos_token=False)
        replaced = normalizers.Replace(" ", "▁")
        tokenizer.backend_tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), replaced])
        tokenizer.backend_tokenizer.pre_tokenizer = None
        return tokenizer
    if model_type == "gemma3_text":
        return sentencepiece_tokenizer(GemmaTokenizer)
    return byte_level_tokenizer({"llama": "smollm", "qwen2": "qwen2", "qwen3": "qwen2"}[model_type])


def write_folder(
    path: Path,
    model_type: str = "llama",
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    dtype: torch.dtype = torch.bfloat16,
    **changes: Any,
) -> dict[str, torch.Tensor]:
    """Write `config.json`, weights and tokenizer; the state dict."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, **(SIZES | HEADS.get(model_type, {}) | changes))
    model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:  # which are all ones or zeros otherwise
            torch.nn.init.normal_(parameter, mean=0.0 if name.endswith("bias") else 1.0, std=0.1)
    model.generation_config = GenerationConfig(bos_token_id=1, eos_token_id=[2, 1], pad_token_id=0)
    model.save_pretrained(path)
    (tokenizer or default_tokenizer(model_type)).save_pretrained(path)
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}
