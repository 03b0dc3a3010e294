"""Original and converted models side by side: bytes, quality, speed.

The rows are the reference in fp32 (whose predictions the others are held against), the reference in bf16 (what most
checkpoints are run in), and each candidate. A reference that is quantized already is taken as it is, once. One model is
in memory at a time; see `quality` for how.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fewbits.errors import FewbitsError
from fewbits.measure import memory
from fewbits.measure import text as texts
from fewbits.measure.comparison import Comparison, Layer, Row, Worst
from fewbits.measure.layers import ReferenceLayers
from fewbits.measure.machine import this_machine
from fewbits.measure.peak import PeakMemory
from fewbits.measure.pieces import next_text, token_texts
from fewbits.measure.positions import WorstPosition
from fewbits.measure.quality import Quality, Reference, check_vocabulary
from fewbits.measure.speed import NEW_TOKENS, REPEATS, Speed, measure_speed
from fewbits.measure.subject import ModelOrPath, Subject

Progress = Callable[[str, int, int], None]
"""Called with what is being done ("bf16: text"), steps done, and steps in all."""

_CONTEXT = 24  # tokens of text before a worst position


def compare(
    reference: ModelOrPath,
    candidates: Iterable[ModelOrPath] = (),
    text: str | Path | None = None,
    *,
    precisions: Sequence[str] = (),
    tokenizer: texts.Tokenizer | None = None,
    windows: int = texts.WINDOWS,
    window_tokens: int = texts.WINDOW_TOKENS,
    new_tokens: int = NEW_TOKENS,
    with_speed: bool = True,
    device: str = "cpu",
    progress: Progress | None = None,
) -> Comparison:
    """Measure a reference in fp32 and bf16, and candidates beside it.

    Args:
        reference: the model that the others are held against; where it is quantized, it has one row, as it is.
        candidates: models of the same vocabulary, such as conversions of it.
        text: a UTF-8 file to measure on; None takes the built-in text.
        precisions: what to quantize the reference to while it is loaded, each a row after the reference's.
        tokenizer: the reference's; None loads it from the reference's path, and is refused for a live model.
        windows: windows of text at most.
        window_tokens: tokens in a window, and in the prompt that speed is measured with.
        new_tokens: tokens written one at a time for the decode speed.
        with_speed: whether to time the models, and to look at the memory that they run in.
        device: where models on disk are loaded: `cpu` or `cuda`; a live model stays where it is.
        progress: called as the work goes on.

    Raises:
        FewbitsError: a path is no model, the text is unusable, a candidate's vocabulary is another, a precision is
            unknown or cannot be had, a window is longer than a model's context, or the device is none.
    """
    _check_device(device)
    original = Subject.of(reference)
    # A wrong path or another vocabulary is found before any work.
    given = [Subject.of(each) for each in candidates]
    subjects = [*original.as_reference(), *(original.in_precision(each) for each in precisions), *given]
    tokenizer = tokenizer or original.tokenizer()
    for subject in subjects:
        _check(subject, original, window_tokens)
    ids = texts.token_windows(tokenizer, text, windows, window_tokens)
    for subject in given:
        _check_tokenizer(subject, tokenizer, ids[0])
    prompt = _prompt(ids[0], subjects, new_tokens) if with_speed else None
    with _Comparing(ids, tokenizer, prompt, new_tokens, device, progress or _silent) as comparing:
        rows = tuple(comparing.row(subject) for subject in subjects)
    return Comparison(
        rows=rows,
        reference=original.name,
        reference_bytes=original.source_bytes,
        text=texts.text_name(text),
        windows=ids.shape[0],
        window_tokens=ids.shape[1],
        prompt_tokens=None if prompt is None else len(prompt),
        new_tokens=new_tokens if with_speed else None,
        speed_repeats=REPEATS if with_speed else None,
        date=datetime.now(UTC).isoformat(timespec="seconds"),
        machine=this_machine(),
        notes=tuple(comparing.notes),
        tokens=comparing.tokens,
    )


class _Comparing(ExitStack):
    """Rows one after the other; the first is the reference of the rest. Closing it gives the temporary file back."""

    def __init__(
        self,
        windows: torch.Tensor,
        tokenizer: Any,
        prompt: torch.Tensor | None,
        new_tokens: int,
        device: str,
        progress: Progress,
    ) -> None:
        super().__init__()
        self._windows = windows
        self._tokenizer = tokenizer if hasattr(tokenizer, "decode") else None
        self._prompt, self._new_tokens = prompt, new_tokens
        self._device, self._progress = device, progress
        self._reference: Reference | None = None
        self._layers: ReferenceLayers | None = None
        self.notes: list[str] = []
        self.tokens = tuple(token_texts(tokenizer, ids) for ids in windows.tolist()) if self._tokenizer else ()

    def row(self, subject: Subject) -> Row:
        label = subject.name if subject.precision is None else subject.precision
        peak = PeakMemory(self._device)  # frees what is left of the last row's model, a name of this function alone
        model = subject.load(self._device, self._step(f"{label}: loading"))
        quality = self._quality(model, label, self._step(f"{label}: text"))
        layers = self._of_layers(model)
        seen = peak.restart() and subject.is_loaded_here and self._prompt is not None
        speed = self._speed(model, self._step(f"{label}: speed"))
        return Row(
            name=subject.name,
            precision=subject.precision_name(model),
            disk_bytes=subject.disk_bytes(model),
            memory_bytes=memory.weight_bytes(model),
            bits_per_weight=memory.bits_per_weight(model),
            kl=quality.kl,
            kl_stderr=quality.kl_stderr,
            top1=quality.top1,
            perplexity=quality.perplexity,
            prefill_tps=speed.prefill if speed else None,
            decode_tps=speed.decode if speed else None,
            top1_stderr=quality.top1_stderr,
            perplexity_stderr=quality.perplexity_stderr,
            peak_bytes=peak.grown() if seen else None,
            layers=layers,
            losses=quality.losses,
            kls=quality.kls,
            worst=tuple(self._in_words(position) for position in quality.worst),
        )

    def _quality(self, model: nn.Module, label: str, progress: Callable[[int, int], None]) -> Quality:
        if self._reference is None:
            self._reference = self.enter_context(Reference(model, self._windows, progress))
            self._note_nonsense(self._reference)
            return self._reference.quality
        quality = self._reference.measure(model, progress)
        self._note_nonfinite(label, quality)
        return quality

    def _of_layers(self, model: nn.Module) -> tuple[Layer, ...]:
        if self._layers is None:
            self._layers = self.enter_context(ReferenceLayers(model, self._windows[0]))
            return self._layers.layers
        return self._layers.measure(model)

    def _note_nonsense(self, reference: Reference) -> None:
        """Say that the reference itself does not know the text: no candidate's figures mean anything then."""
        perplexity, vocabulary = reference.quality.perplexity, reference.vocabulary
        if not perplexity <= vocabulary / 4:  # NaN too
            self.notes.append(
                f"The reference makes no sense of this text: its perplexity is {perplexity:.6g}, and one that knows "
                f"nothing has that of its vocabulary, {vocabulary}. Its weights may be damaged or random, its "
                "tokenizer another model's, or the text of a language it never saw."
            )

    def _note_nonfinite(self, label: str, quality: Quality) -> None:
        bad = [(w, t) for w, window in enumerate(quality.kls) for t, kl in enumerate(window) if not math.isfinite(kl)]
        if bad:
            window, position = bad[0]
            what = "NaN" if math.isnan(quality.kls[window][position]) else "infinite"
            self.notes.append(
                f"{label}: its divergence is {what} at {len(bad)} of {quality.positions} positions, first in window "
                f"{window} after token {position}: NaN or Inf in its logits there, or in the reference's."
            )

    def _in_words(self, found: WorstPosition) -> Worst:
        ids, after = self._windows[found.window].tolist(), found.position + 1
        said = ids[max(0, after - _CONTEXT) : after]
        context, following = "", ""
        if self._tokenizer is not None:
            pieces = self.tokens[found.window]
            context, following = "".join(pieces[max(0, after - _CONTEXT) : after]), "".join(pieces[after : after + 1])

        def named(choices: tuple[tuple[int, float], ...]) -> tuple[tuple[str, float], ...]:
            name = (lambda token: next_text(self._tokenizer, said, token)) if self._tokenizer else "#{}".format
            return tuple((name(token), probability) for token, probability in choices)

        return Worst(
            found.window, found.position, found.kl, context, following, named(found.reference), named(found.candidate)
        )

    def _speed(self, model: nn.Module, progress: Callable[[int, int], None]) -> Speed | None:
        return None if self._prompt is None else measure_speed(model, self._prompt, self._new_tokens, progress=progress)

    def _step(self, what: str) -> Callable[[int, int], None]:
        return lambda done, total: self._progress(what, done, total)


def _check_device(device: str) -> None:
    if device not in ("cpu", "cuda"):
        raise FewbitsError(f"device {device!r} is none that models are compared on; give cpu or cuda")
    if device == "cuda" and not torch.cuda.is_available():
        raise FewbitsError("device cuda: PyTorch finds no CUDA GPU here; see fewbits doctor, or give cpu")


def _check(subject: Subject, original: Subject, window_tokens: int) -> None:
    """Compare what configurations tell: an hour of work must not end in a refusal."""
    if subject.vocabulary is not None and original.vocabulary is not None:
        check_vocabulary(subject.name, subject.vocabulary, original.vocabulary)
    if subject.context is not None and window_tokens > subject.context:
        raise FewbitsError(
            f"windows of {window_tokens} tokens are longer than the context of {subject.name}, {subject.context} "
            "tokens; measure shorter windows"
        )


def _check_tokenizer(subject: Subject, tokenizer: Any, window: torch.Tensor) -> None:
    """Compare what tokens stand for: a vocabulary of the same size may still be another."""
    theirs = subject.own_tokenizer() if hasattr(tokenizer, "decode") else None
    if theirs is None:
        return
    ids = window.tolist()
    ours, others = (each.decode(ids, clean_up_tokenization_spaces=False) for each in (tokenizer, theirs))
    if ours != others:
        at = next((i for i, (one, other) in enumerate(zip(ours, others, strict=False)) if one != other), 0)
        raise FewbitsError(
            f"the vocabularies differ: the tokens of {ours[at : at + 20]!r} in the reference are those of "
            f"{others[at : at + 20]!r} in {subject.name}; compare models of one tokenizer"
        )


def _prompt(window: torch.Tensor, subjects: Iterable[Subject], new_tokens: int) -> torch.Tensor:
    """The tokens that speed is measured with: a window, or what the contexts leave of it beside the new tokens."""
    contexts = [subject.context for subject in subjects if subject.context is not None]
    room = min(contexts, default=len(window) + new_tokens) - new_tokens
    if room < 1:
        raise FewbitsError(
            f"new_tokens is {new_tokens}, and a context of {min(contexts)} tokens leaves no room for a prompt; "
            "write fewer"
        )
    return window[:room]


def _silent(what: str, done: int, total: int) -> None:
    pass
