"""How far a model's predictions are from a reference's: KL divergence, top-1 agreement, perplexity.

Shapes: W windows, T tokens in a window, V vocabulary, R rows (positions) of one chunk.

One model is in memory at a time. The reference runs over the text once and leaves its log-probabilities in a
temporary file (W·T·V float32: 0.8 GB for 4,096 tokens of a 49k vocabulary); every candidate is then held against
that file. Two models side by side would take 1.5 times the memory of the largest (fp32 and bf16 copies), and
would run the reference again for every candidate. In memory are the logits of one window, a chunk of log-probabilities
of each model, and a few numbers for each position.

    reference  --forward-->  logits [T, V]  --log-softmax by R rows-->  file  --\
                                                                                 KL, top-1
    candidate  --forward-->  logits [T, V]  --log-softmax by R rows-->  [R, V] -/
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self

import torch

from fewbits.errors import FewbitsError
from fewbits.measure.positions import WorstPosition, WorstPositions, standard_error
from fewbits.measure.scratch import Kept, Scratch
from fewbits.tensors.divergence import kl_divergence

_CHUNK_BYTES = 8 << 20  # of float32 log-probabilities; half a dozen such tensors are in memory, small beside any model

Model = Callable[..., Any]
"""Anything called as `model(input_ids=[1, T])` whose answer has `.logits` [1, T, V]."""
Progress = Callable[[int, int], None]
"""Called with windows done and windows in all."""


@dataclass(frozen=True)
class Quality:
    """A model's predictions on a text, beside a reference's.

    `kl` and `top1` are over every position of every window, the last included: both models predict there too.
    `perplexity` is over the T - 1 positions of a window whose next token is known. The standard errors are those of
    `positions.standard_error`, by blocks of positions.
    """

    kl: float
    """KL(reference || model), mean over positions, nats/token. 0 for the reference; NaN if the model gives NaN."""
    kl_stderr: float
    """Standard error of `kl`, nats/token."""
    top1: float
    """Share of positions where both models rank the same token first, 0 to 1."""
    top1_stderr: float
    perplexity: float
    """exp of the mean negative log-likelihood of the next token."""
    perplexity_stderr: float
    """Perplexity times the standard error of that mean."""
    positions: int
    """How many positions `kl` and `top1` are means of (W·T)."""
    kls: tuple[tuple[float, ...], ...] = field(repr=False)
    """KL of the prediction at each position, nats [W, T]."""
    losses: tuple[tuple[float | None, ...], ...] = field(repr=False)
    """Negative log-likelihood of each token given those before it, nats [W, T]; None for the first of a window."""
    worst: tuple[WorstPosition, ...] = field(default=(), repr=False)
    """The positions of the greatest KL, the worst first."""


class Reference:
    """A reference model's log-probabilities over windows of text, kept in a temporary file.

    The file goes away with `close`, at the end of a `with`, or with the process.
    """

    def __init__(self, model: Model, windows: torch.Tensor, progress: Progress | None = None) -> None:
        """Run the reference over the text.

        Args:
            model: the reference.
            windows: token ids [W, T].
            progress: called after each window.

        Raises:
            FewbitsError: the temporary folder has too little room for W·T·V float32, or becomes full.
        """
        self.windows = windows
        self.vocabulary = 0
        """How many tokens the reference gives a probability; known once it has run."""
        self._scratch = Scratch("the reference's log-probabilities")
        self._kept: list[Kept] = []
        try:
            self.quality = self._record(model, progress)
            """The reference against itself."""
        except BaseException:
            self.close()
            raise

    def _record(self, model: Model, progress: Progress | None) -> Quality:
        same, losses = self._figures(2)
        for index, window in enumerate(self.windows):
            for rows, log_p in _log_probabilities(model, window):
                if not self.vocabulary:
                    self.vocabulary = log_p.shape[-1]
                    self._scratch.check_room(self.windows.numel() * self.vocabulary * 4)
                self._kept.append(self._scratch.add(log_p))
                losses[index, rows] = _next_token_loss(log_p, window, rows)
            if progress:
                progress(index + 1, len(self.windows))
        return _quality(same, same + 1, losses[:, :-1], ())

    def measure(self, model: Model, progress: Progress | None = None) -> Quality:
        """Hold a model against the reference, over the same windows.

        Raises:
            FewbitsError: the model's vocabulary has another size than the reference's.
        """
        kept = iter(self._kept)  # the chunks of one vocabulary are alike
        worst = WorstPositions()
        kls, agreed, losses = self._figures(3)
        for index, window in enumerate(self.windows):
            for rows, log_q in _log_probabilities(model, window):
                check_vocabulary("the candidate", log_q.shape[-1], self.vocabulary)
                log_p = self._scratch.read(next(kept)).to(log_q.device)
                kl = kl_divergence(log_p, log_q)
                worst.see(index, rows.start, kl, log_p, log_q)
                kls[index, rows] = kl.cpu()
                agreed[index, rows] = (log_p.argmax(-1) == log_q.argmax(-1)).double().cpu()
                losses[index, rows] = _next_token_loss(log_q, window, rows)
            if progress:
                progress(index + 1, len(self.windows))
        return _quality(kls, agreed, losses[:, :-1], worst.found())

    def _figures(self, count: int) -> torch.Tensor:
        """Room for figures of every position, [count, W, T].

        It is made at once: small tensors that stay would break up the heap between the large ones that come and go.
        """
        return torch.zeros((count, *self.windows.shape), dtype=torch.float64)

    def close(self) -> None:
        """Give the temporary file back."""
        self._scratch.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def compare_models(reference: Model, candidate: Model, windows: torch.Tensor) -> tuple[Quality, Quality]:
    """Quality of two live models over windows [W, T]: the reference's own, and the candidate's against it.

    Raises:
        FewbitsError: the vocabularies differ in size, or the temporary folder is too full.
    """
    with Reference(reference, windows) as recorded:
        return recorded.quality, recorded.measure(candidate)


def _log_probabilities(model: Model, window: torch.Tensor) -> Iterator[tuple[slice, torch.Tensor]]:
    """One forward pass; log-probabilities float32 [R, V] of its positions, a chunk of rows at a time."""
    device = getattr(model, "device", window.device)
    with torch.inference_mode():
        logits = model(input_ids=window[None].to(device)).logits[0]  # [T, V]
        step = max(1, _CHUNK_BYTES // (4 * logits.shape[-1]))
        for start in range(0, len(logits), step):
            rows = slice(start, min(start + step, len(logits)))
            yield rows, torch.log_softmax(logits[rows].float(), dim=-1)


def check_vocabulary(name: str, tokens: int, expected: int) -> None:
    """Refuse a model that gives another number of tokens a probability than the reference does.

    Raises:
        FewbitsError: the numbers differ.
    """
    if tokens != expected:
        raise FewbitsError(
            f"the vocabularies differ: {tokens} tokens in {name}, {expected} in the reference; "
            "compare models of one tokenizer"
        )


def _next_token_loss(log_q: torch.Tensor, window: torch.Tensor, rows: slice) -> torch.Tensor:
    """Negative log-likelihood float64 [R] of the tokens that follow these rows; 0 for the window's last."""
    following = window[rows.start + 1 : rows.stop + 1].to(log_q.device)
    losses = torch.zeros(len(log_q), dtype=torch.float64)
    losses[: len(following)] = -log_q[: len(following)].gather(-1, following[:, None]).squeeze(-1).cpu()
    return losses


def _quality(
    kls: torch.Tensor, agreements: torch.Tensor, losses: torch.Tensor, worst: tuple[WorstPosition, ...]
) -> Quality:
    """Figures of positions [W, T], and of known next tokens [W, T - 1], drawn together."""
    perplexity = losses.mean().exp().item()
    return Quality(
        kl=kls.mean().item(),
        kl_stderr=standard_error(kls),
        top1=agreements.mean().item(),
        top1_stderr=standard_error(agreements),
        perplexity=perplexity,
        perplexity_stderr=perplexity * standard_error(losses),
        positions=kls.numel(),
        kls=tuple(tuple(window) for window in kls.tolist()),
        losses=tuple((None, *window) for window in losses.tolist()),
        worst=worst,
    )
