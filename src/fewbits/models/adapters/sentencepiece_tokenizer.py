"""A sentencepiece vocabulary of byte pairs as a tokenizer of the tokenizers library, which gives the same ids."""

import re

from tokenizers import Regex, Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE

from fewbits.errors import FewbitsError
from fewbits.models.adapters.sentencepiece_model import BYTE_PAIRS, Kind, SentencePieceModel

GUARD = "\ufdd0"
"""Keeps a word in text from being found as a special token.

Special tokens are looked for before text is normalized, and normalizing takes the guard out. Other text loses nothing:
Unicode keeps this code point out of text for good (its section 23.7).
"""
_SPACE = "▁"  # how a space is written in pieces


def byte_pair_tokenizer(model: SentencePieceModel, more: tuple[str, ...] = ()) -> Tokenizer:
    """Build the tokenizer of a sentencepiece model, without special tokens.

    Args:
        model: The vocabulary.
        more: Tokens behind it, which take the next ids; text is never cut into them.

    Raises:
        FewbitsError: It is not of byte pairs, or a token has two ids.
    """
    if model.algorithm != BYTE_PAIRS:
        raise FewbitsError(
            f"{model.path}: is a sentencepiece model of type {model.algorithm}; read are byte pairs, {BYTE_PAIRS}: "
            "use the tokenizer that the model was published with"
        )
    texts = [*(piece.text for piece in model.pieces), *more]
    vocabulary = {text: index for index, text in enumerate(texts)}
    if len(vocabulary) < len(texts):
        twice = next(text for index, text in enumerate(texts) if vocabulary[text] != index)
        raise FewbitsError(f"{model.path}: the token {twice!r} has two ids; fetch the file again")
    unknown = next((piece.text for piece in model.pieces if piece.kind is Kind.UNKNOWN), None)
    symbols = sorted((p.text for p in model.pieces if p.kind is Kind.USER_DEFINED), key=len, reverse=True)
    tokenizer = Tokenizer(
        BPE(
            vocabulary,
            _merges(model),
            unk_token=unknown,
            fuse_unk=True,
            byte_fallback=model.byte_fallback,
            ignore_merges=bool(symbols),  # a symbol is cut out below, and is no merge of others
        )
    )
    if symbols:
        pattern = "|".join(re.escape(symbol).replace(" ", _SPACE) for symbol in symbols)
        tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(pattern), "isolated")
    tokenizer.normalizer = normalizers.Sequence([normalizers.Replace(GUARD, ""), *_normalizers(model)])
    steps = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence(steps + [decoders.Strip(" ", 1, 0)] * model.dummy_prefix)
    return tokenizer


def _merges(model: SentencePieceModel) -> list[tuple[str, str]]:
    """Every pair of pieces that together are a piece, those of the highest score first.

    sentencepiece merges whatever neighbours make the piece of the highest score, while the tokenizers library takes
    the first pair of a list: so the list holds every way to cut a piece in two.
    """
    known = {piece.text for piece in model.pieces if piece.kind is Kind.NORMAL}
    best_first = sorted((piece for piece in model.pieces if piece.text in known), key=lambda piece: -piece.score)
    cuts = ((piece.text[:cut], piece.text[cut:]) for piece in best_first for cut in range(1, len(piece.text)))
    return [(left, right) for left, right in cuts if left in known and right in known]


def _normalizers(model: SentencePieceModel) -> list[normalizers.Normalizer]:
    """What sentencepiece does to text before it cuts it, in its order."""
    steps: list[normalizers.Normalizer] = []
    if model.charsmap:
        steps.append(normalizers.Precompiled(model.charsmap))
    if model.remove_extra_whitespaces:
        steps += [normalizers.Replace(Regex(" {2,}"), " "), normalizers.Strip()]
    if model.dummy_prefix:
        steps.append(normalizers.Prepend(_SPACE))
    return [*steps, normalizers.Replace(" ", _SPACE)]
