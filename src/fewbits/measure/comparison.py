"""What a comparison finds, as plain data: the models, one a row, and what they were measured on.

Shapes: W windows, T tokens in a window. At position t a model has read the tokens 0…t of its window.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from fewbits.measure.machine import Machine

_LOSS_DIGITS, _KL_DIGITS = 4, 6  # of what is written for every token: more would only make files larger

Choice = tuple[str, float]
"""A token as text, and the probability that a model gives it."""


@dataclass(frozen=True)
class Layer:
    """One layer of a model beside the reference's: see `measure.layers` for what is measured."""

    module: str
    """Its name in the reference."""
    format: str
    """What its weights are stored in."""
    bits: float
    """Bits per weight, scales included."""
    sqnr_db: float | None
    """Signal-to-quantization-noise ratio of its output; None for the reference, and where it was not measured."""


@dataclass(frozen=True)
class Worst:
    """A position at which a model departs most from the reference, with its text."""

    window: int
    position: int
    """The last token that both had read."""
    kl: float
    """KL(reference || this) of the prediction made there, nats."""
    context: str
    """The end of what both had read."""
    following: str
    """The token that follows in the text; empty at the end of a window."""
    reference: tuple[Choice, ...]
    """The likeliest next tokens to the reference."""
    candidate: tuple[Choice, ...]
    """The likeliest next tokens to this model."""


@dataclass(frozen=True)
class Row:
    """One model, measured. A figure that was not measured is None.

    Standard errors take blocks of 64 neighbouring positions as independent (`positions.standard_error`).
    """

    name: str
    precision: str
    disk_bytes: int | None
    """Bytes of the weights on disk; for a cast of the reference, what a checkpoint of it takes."""
    memory_bytes: int
    """Bytes of weights in memory, tied ones once."""
    bits_per_weight: float | None
    """Of the quantized layers, scales included; of the linear layers if none is quantized."""
    kl: float
    """KL(reference || this), nats/token."""
    kl_stderr: float
    top1: float
    """Share of positions with the reference's first choice, 0 to 1."""
    perplexity: float
    prefill_tps: float | None
    """Prompt tokens per second."""
    decode_tps: float | None
    """Written tokens per second."""
    top1_stderr: float = math.nan
    perplexity_stderr: float = math.nan
    peak_bytes: int | None = None
    """The most memory that it took while it read a prompt and wrote tokens, measured (`measure.peak`): with its cache
    and activations, without Python and the libraries. None for a live model, without speed, and where Linux is not."""
    layers: tuple[Layer, ...] = ()
    losses: tuple[tuple[float | None, ...], ...] = ()
    """Negative log-likelihood of token t given those before it, nats [W, T]; None for the first of a window."""
    kls: tuple[tuple[float, ...], ...] = ()
    """KL(reference || this) of the prediction made at position t, which is of token t + 1, nats [W, T]."""
    worst: tuple[Worst, ...] = ()
    """The positions of the greatest KL, the worst first."""

    def to_json(self) -> dict[str, Any]:
        """Plain data; what is NaN or infinite becomes None, which JSON can say."""
        plain: dict[str, Any] = asdict(self)
        plain["losses"] = _rounded(self.losses, _LOSS_DIGITS)
        plain["kls"] = _rounded(self.kls, _KL_DIGITS)
        finite: dict[str, Any] = _finite(plain)
        return finite


@dataclass(frozen=True)
class Comparison:
    """The rows, and what they were measured on. The first row is the model that all are held against."""

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
    notes: tuple[str, ...] = ()
    """What a reader of the figures has to know: a reference that makes no sense of the text, a model that gives NaN."""
    tokens: tuple[tuple[str, ...], ...] = ()
    """The text of each token [W, T]; joined, they give the text. Empty if the tokenizer does not decode."""

    def to_json(self) -> dict[str, Any]:
        """Plain data for a JSON file; what is NaN or infinite becomes None, which JSON can say."""
        return {
            **vars(self),
            "rows": [row.to_json() for row in self.rows],
            "machine": self.machine.to_json(),
            "notes": list(self.notes),
            "tokens": [list(window) for window in self.tokens],
        }


def _rounded(values: tuple[tuple[float | None, ...], ...], digits: int) -> list[list[float | None]]:
    return [[None if value is None else round(value, digits) for value in window] for window in values]


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
