"""Who looks at the operands of matmuls in a float32 run: a recorder.

The counter of a run in low precision (``preflight_counter``) is told by the same lines of ``fewbits.train.matmul``, so
a prediction and its check count the same tensors.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fewbits.errors import FewbitsError
from fewbits.formats import Format
from fewbits.train.exponents import Counts, Histogram
from fewbits.train.preflight_names import Key, ModuleNames, split_key
from fewbits.train.preflight_rehearsal import Scales
from fewbits.train.recipe import Recipe, is_eight_bit
from fewbits.train.scaling import AmaxHistory, scale_amax, scale_exponents

RESOLVED = 2.0**-24
"""Of float32: what is smaller, beside another term of a sum, leaves no trace in it."""


def noise_rows(x: Tensor, key: str) -> Tensor | None:
    """The rows of a gradient that say nothing, bool ``[R]``; None where there are none, or for other operands.

    The query of a first token sees only its own key: its gradient is zero in exact arithmetic, a difference of equal
    terms, of which each precision leaves another noise. So a row (a token) whose largest magnitude is below what
    float32 resolves beside the tensor's largest is nothing that a format could lose.
    """
    if not key.endswith(" gradient") or x.ndim != 2 or not x.numel():
        return None
    largest = x.detach().abs().amax(1)
    noise = largest <= RESOLVED * largest.amax()
    return noise if bool(noise.any()) else None


@dataclass
class Record:
    """What a float32 run tells about one operand or result.

    Attributes:
        fmt: The format that it would take.
        raw: Its values.
        scaled: In an 8-bit format: its values times the scales that the recipe gives them.
        scales: How often each scale 2^k was given to a whole tensor, by k.
    """

    fmt: Format
    raw: Histogram = field(default_factory=Histogram)
    scaled: Histogram | None = None
    scales: Counter[int] = field(default_factory=Counter)

    @property
    def seen(self) -> Histogram:
        """The values as the format sees them, but for the loss scale."""
        return self.raw if self.scaled is None else self.scaled


class Recorder(ModuleNames):
    """Histograms of all operands in a float32 run, and of 8-bit ones with the scales of a recipe.

    Args:
        recipe: The one that is asked about.
        kept: The linear layers that it keeps.
    """

    def __init__(self, recipe: Recipe, kept: set[str]) -> None:
        super().__init__()
        self.recipe, self._kept = recipe, kept
        self.records: dict[Key, Record] = {}
        self.linears: set[str] = set()
        self._history = AmaxHistory(recipe.history)
        self._weights: set[str] = set()
        self._last: tuple[Tensor, int, Counts] | None = None
        self._rehearsed: dict[str, Iterator[int]] = {}

    def operand(self, key: str, before: Tensor, after: Tensor, fmt: Format, amax: Tensor | None, square: bool) -> None:
        """Record an operand; the weights, which do not change, once.

        Raises:
            FewbitsError: It has NaN.
        """
        module, kind = split_key(key)
        self._add(key, before, self._format(module, kind), square)

    def plain(self, key: str, x: Tensor) -> None:
        """Record an operand of what is no linear layer."""
        self._add(key, x, self.recipe.results, False)

    def _add(self, key: str, x: Tensor, fmt: Format, square: bool) -> None:
        module, kind = split_key(key)
        if kind == "weight":
            if key in self._weights:
                return
            self._weights.add(key)
        counts = self._counts(x)
        if counts.nan:
            raise FewbitsError(
                f"{module or 'the model'}: {counts.nan} of {x.numel()} values of its {kind} are NaN in fp32 already; "
                "repair the model first: no precision can be judged by NaN"
            )
        record = self._record(module, kind, fmt)
        record.raw.add(counts)
        if record.scaled is not None:
            self._add_scaled(record, x, counts, key, square)

    def result(self, key: str, result: Tensor) -> None:
        """Record what a matmul gave; linear layers give gradients of weights and inputs."""
        module, kind = split_key(key)
        if kind == "weight_gradient":
            self.linears.add(module)
            counts = Counts.of(result)
        else:
            low, high = torch.aminmax(result.detach().float()) if result.numel() else (result.new_zeros(()),) * 2
            counts = Counts.none(max(-float(low), float(high)))
        fmt = self.recipe.kept if module in self._kept else self.recipe.results
        self._record(module, kind, fmt).raw.add(counts)

    def begin_step(self, scales: Scales) -> None:
        """A step begins, in which whole 8-bit tensors have these scales, told by a rehearsal."""
        self._rehearsed = {key: iter(exponents) for key, exponents in scales.items()}

    def end_step(self) -> None:
        """A step is over: delayed scaling looks back by steps."""
        self._history.end_step(keep=True)
        self._last = None

    def _format(self, module: str, kind: str) -> Format:
        if module in self._kept:
            return self.recipe.kept
        fields = {"weight": self.recipe.weights, "activation": self.recipe.activations}
        return fields.get(kind, self.recipe.gradients)

    def _record(self, module: str, kind: str, fmt: Format) -> Record:
        if (module, kind) not in self.records:
            self.records[module, kind] = Record(fmt, scaled=Histogram() if is_eight_bit(fmt) else None)
        return self.records[module, kind]

    def _counts(self, x: Tensor) -> Counts:
        """Layers that read the same tensor one after the other count it once."""
        if self._last is not None:
            last, version, counts = self._last
            if last.data_ptr() == x.data_ptr() and last.shape == x.shape and version == x._version:
                return counts
        counts = Counts.of(x)
        self._last = (x.detach(), x._version, counts)
        return counts

    def _add_scaled(self, record: Record, x: Tensor, counts: Counts, key: str, square: bool) -> None:
        assert record.scaled is not None
        noise = noise_rows(x, key)
        if noise is not None:
            counts = counts.as_if_zero(Counts.of(x[noise]))
        for rows in self._orientations(x, square):
            exponents = self._exponents(rows, record.fmt, key, square)
            if exponents.ndim == 0 and bool(exponents.isfinite()):
                record.scales[int(exponents)] += 1
                record.scaled.add(counts.scaled(int(exponents)))
            else:
                record.scaled.add(Counts.of(rows * torch.exp2(exponents)))

    def _exponents(self, x: Tensor, fmt: Format, key: str, square: bool) -> Tensor:
        """The k of the scales 2^k: those of the rehearsal, else from the values here."""
        amax = scale_amax(x, self.recipe.scaling, self._history, key, square)
        rehearsed = next(self._rehearsed.get(key, iter(())), None)
        if rehearsed is not None:
            return torch.tensor(float(rehearsed), device=x.device)
        if self.recipe.results.name == "bf16" and not key.endswith(" weight"):
            amax = amax.bfloat16().float()  # before they get 8 bits, these are in the format of the results
        return scale_exponents(x, fmt, amax, square)

    def _orientations(self, x: Tensor, square: bool) -> tuple[Tensor, ...]:
        """Where scales run along the sums, the backward pass rounds anew along other sums."""
        both = self.recipe.scaling == "row" or (self.recipe.scaling == "block" and not square)
        return (x, x.t()) if both else (x,)
