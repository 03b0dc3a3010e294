"""What a plan says: a row for each precision and for each way of training, and what it was found from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from fewbits.measure.plan_memory import Memory

_CLASSES = ("negligible", "slight", "visible")


@dataclass(frozen=True)
class PlanRow:
    """One precision. Bytes are for the batch and context of the plan.

    Attributes:
        precision: Its name.
        bits_per_weight: Of the quantized layers, scales included.
        weights: Bytes of the weights in memory.
        cache: Of keys and values as they are computed; 0 where the model keeps none.
        cache_int8: The same with ``kv_cache="int8"``.
        activations: Of a pass over the whole context at once; an estimate.
        fits: Names of the memories that it fits in, with keys and values as they are computed.
        fits_int8: The same with ``kv_cache="int8"``.
        longest_context: Tokens that fit in the largest memory beside the weights, at most the model's own limit; 0: not
            even the weights fit; None: the context takes no memory.
        longest_context_int8: The same with ``kv_cache="int8"``.
        tokens_per_second: Of each text after the context; an estimate. None where the model writes none, or no
            bandwidth was measured.
        accuracy: The loss to expect: negligible, slight or visible.
        kl: The measured KL behind it, nats/token, of another, small model; None: none was measured for it.
        command: What to run for it.
    """

    precision: str
    bits_per_weight: float
    weights: int
    cache: int
    cache_int8: int
    activations: int
    fits: tuple[str, ...]
    fits_int8: tuple[str, ...]
    longest_context: int | None
    longest_context_int8: int | None
    tokens_per_second: float | None
    accuracy: str
    kl: float | None
    command: str

    @property
    def total(self) -> int:
        """Weights, keys and values as they are computed, activations."""
        return self.weights + self.cache + self.activations

    @property
    def total_int8(self) -> int:
        """The same with keys and values in int8."""
        return self.weights + self.cache_int8 + self.activations


@dataclass(frozen=True)
class TrainingRow:
    """One way of training all weights with AdamW, on the batch and context of the plan.

    Attributes:
        name: The recipe, and how weights and moments are kept.
        bytes_per_parameter: All but activations.
        weights: Bytes of the master weights.
        low_precision_copy: Of the copy that matmuls read, where it is not the master itself.
        gradients: Of one micro-batch; several add up in float32.
        state: Of the two moments.
        activations: Kept for the backward pass, and the logits; an estimate.
        fits: Names of the memories that it fits in.
        command: What to run, or to write in Python.
    """

    name: str
    bytes_per_parameter: float
    weights: int
    low_precision_copy: int
    gradients: int
    state: int
    activations: int
    fits: tuple[str, ...]
    command: str

    @property
    def total(self) -> int:
        """All of it."""
        return self.weights + self.low_precision_copy + self.gradients + self.state + self.activations


@dataclass(frozen=True)
class Plan:
    """What fits, and what it was found from.

    Attributes:
        model: As the user named it.
        architecture: The class of transformers that carries it.
        parameters: All, tied ones once.
        context: Tokens of each text.
        context_limit: That the model sees at most; None: it does not say.
        batch: Texts at once.
        memories: What it is planned for.
        bandwidth: Bytes read per second, by the memories' names; None: not measured.
        rows: The precisions.
        trainings: Ways of training; empty where they were not asked for.
        notes: What the reader should know besides.
    """

    model: str
    architecture: str
    parameters: int
    context: int
    context_limit: int | None
    batch: int
    memories: tuple[Memory, ...]
    bandwidth: dict[str, float | None]
    rows: tuple[PlanRow, ...]
    trainings: tuple[TrainingRow, ...]
    notes: tuple[str, ...]

    @property
    def best(self) -> PlanRow | None:
        """Of the precisions that fit, one of the best accuracy class, in it the one that reads the fewest bytes."""
        fit = [row for row in self.rows if row.fits]
        return min(fit, key=lambda row: (_CLASSES.index(row.accuracy), row.weights), default=None)

    @property
    def best_training(self) -> TrainingRow | None:
        """Of the ways of training that fit, the first in 16 bits with float32 masters, else the next that fits."""
        fit = [row for row in self.trainings if row.fits]
        return next((row for row in fit if row.name == "bf16"), fit[-1] if fit else None)

    @property
    def something_fits(self) -> bool:
        """Whether a precision fits; with trainings, whether one of those does."""
        return (self.best_training if self.trainings else self.best) is not None

    def why_nothing_fits(self) -> str:
        """The smallest there is, what it needs, and what to do."""
        rows: Sequence[PlanRow | TrainingRow] = self.trainings or self.rows
        smallest = min(rows, key=lambda row: row.total)
        name = smallest.name if isinstance(smallest, TrainingRow) else smallest.precision
        largest = max(self.memories, key=lambda memory: memory.nbytes)
        room = f"{largest.nbytes / 2**30:.2f} GiB{'' if largest.name == 'given' else f' of {largest.name}'}"
        what = "no way of training" if self.trainings else "no precision"
        longest = max((row.longest_context or 0 for row in self.rows), default=0)
        shorter = f"--context {longest}" if longest and not self.trainings else "a shorter --context"
        return (
            f"{self.model}: {what} fits in {room}; the smallest, {name}, needs {smallest.total / 2**30:.2f} GiB for "
            f"{self.batch} × {self.context} tokens; take {shorter}, a smaller --batch, a smaller model or more memory"
        )

    def to_json(self) -> dict[str, Any]:
        """Plain data for a JSON file."""
        rows = [asdict(row) | {"total": row.total, "total_int8": row.total_int8} for row in self.rows]
        trainings = [asdict(row) | {"total": row.total} for row in self.trainings]
        best, training = self.best, self.best_training
        return {
            **vars(self),
            "memories": [asdict(memory) for memory in self.memories],
            "rows": rows,
            "trainings": trainings,
            "best": best and best.precision,
            "best_training": training and training.name,
        }
