"""Original and converted models side by side: bytes, quality, speed.

The rows are the reference in fp32 (whose predictions the others are held against), the reference in bf16 (what most
checkpoints are run in), and each candidate. One model is in memory at a time; see `quality` for how.
"""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fewbits.measure import memory
from fewbits.measure import text as texts
from fewbits.measure.machine import Machine, this_machine
from fewbits.measure.quality import Quality, Reference
from fewbits.measure.speed import NEW_TOKENS, REPEATS, Speed, measure_speed
from fewbits.measure.subject import ModelOrPath, Subject

Progress = Callable[[str, int, int], None]
"""Called with what is being done ("bf16: text"), steps done, and steps in all."""


@dataclass(frozen=True)
class Row:
    """One model, measured. A figure that was not measured is None."""

    name: str
    precision: str
    disk_bytes: int | None
    """Bytes of the weights on disk; for a cast of the reference, what a checkpoint of it takes."""
    memory_bytes: int
    """Bytes of weights in memory, tied ones once."""
    bits_per_weight: float | None
    """Of the quantized layers, scales included; of the linear layers if none is quantized."""
    kl: float
    """KL(fp32 reference || this), nats/token."""
    kl_stderr: float
    top1: float
    """Share of positions with the reference's first choice, 0 to 1."""
    perplexity: float
    prefill_tps: float | None
    """Prompt tokens per second."""
    decode_tps: float | None
    """Written tokens per second."""


@dataclass(frozen=True)
class Comparison:
    """The rows, and what they were measured on."""

    rows: tuple[Row, ...]
    reference: str
    reference_bytes: int | None
    """Bytes of the reference's own file or folder; None for a live model."""
    text: str
    windows: int
    window_tokens: int
    prompt_tokens: int | None
    """Length of the prompt that prefill was timed on; None if speed was left out."""
    new_tokens: int | None
    speed_repeats: int | None
    """Runs of which the fastest counts."""
    date: str
    """When the measurement ended, ISO 8601, UTC."""
    machine: Machine

    def to_json(self) -> dict[str, Any]:
        """Plain data for a JSON file; what is NaN or infinite becomes None, which JSON can say."""
        rows = [{key: _finite(value) for key, value in asdict(row).items()} for row in self.rows]
        return {**vars(self), "rows": rows, "machine": self.machine.to_json()}


def compare(
    reference: ModelOrPath,
    candidates: Iterable[ModelOrPath],
    text: str | Path | None = None,
    *,
    tokenizer: texts.Tokenizer | None = None,
    windows: int = texts.WINDOWS,
    window_tokens: int = texts.WINDOW_TOKENS,
    new_tokens: int = NEW_TOKENS,
    with_speed: bool = True,
    progress: Progress | None = None,
) -> Comparison:
    """Measure a reference in fp32 and bf16, and candidates beside it.

    Args:
        reference: the model that the others are held against.
        candidates: models of the same vocabulary, such as conversions of it.
        text: a UTF-8 file to measure on; None takes the built-in text.
        tokenizer: the reference's; None loads it from the reference's path, and is refused for a live model.
        windows: windows of text at most.
        window_tokens: tokens in a window, and in the prompt that speed is measured with.
        new_tokens: tokens written one at a time for the decode speed.
        with_speed: whether to time the models.
        progress: called as the work goes on.

    Raises:
        FewbitsError: a path is no model, the text is unusable, or a candidate's vocabulary is another.
    """
    original = Subject.of(reference)
    subjects = [Subject.of(candidate) for candidate in candidates]  # a wrong path is found before any work
    ids = texts.token_windows(tokenizer or original.tokenizer(), text, windows, window_tokens)
    timed_tokens = new_tokens if with_speed else None
    subjects = [original.in_precision("fp32"), original.in_precision("bf16"), *subjects]
    with _Comparing(ids, timed_tokens, progress or _silent) as comparing:
        rows = tuple(comparing.row(subject) for subject in subjects)
    return Comparison(
        rows=rows,
        reference=original.name,
        reference_bytes=original.source_bytes,
        text=texts.text_name(text),
        windows=ids.shape[0],
        window_tokens=ids.shape[1],
        prompt_tokens=ids.shape[1] if with_speed else None,
        new_tokens=timed_tokens,
        speed_repeats=REPEATS if with_speed else None,
        date=datetime.now(UTC).isoformat(timespec="seconds"),
        machine=this_machine(),
    )


class _Comparing(ExitStack):
    """Rows one after the other; the first is the reference of the rest. Closing it gives the temporary file back."""

    def __init__(self, windows: torch.Tensor, new_tokens: int | None, progress: Progress) -> None:
        super().__init__()
        self._windows = windows
        self._new_tokens = new_tokens
        self._progress = progress
        self._reference: Reference | None = None

    def row(self, subject: Subject) -> Row:
        label = subject.name if subject.precision is None else subject.precision
        gc.collect()  # the last row's model was a name of this function alone; modules can hold each other in cycles
        model = subject.load(self._step(f"{label}: loading"))
        quality = self._quality(model, self._step(f"{label}: text"))
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
        )

    def _quality(self, model: nn.Module, progress: Callable[[int, int], None]) -> Quality:
        if self._reference is None:
            self._reference = self.enter_context(Reference(model, self._windows, progress))
            return self._reference.quality
        return self._reference.measure(model, progress)

    def _speed(self, model: nn.Module, progress: Callable[[int, int], None]) -> Speed | None:
        if self._new_tokens is None:
            return None
        return measure_speed(model, self._windows[0], self._new_tokens, progress=progress)

    def _step(self, what: str) -> Callable[[int, int], None]:
        return lambda done, total: self._progress(what, done, total)


def _silent(what: str, done: int, total: int) -> None:
    pass


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
