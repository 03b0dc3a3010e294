"""What fits: bytes, longest context and speed of a model in every precision, from its configuration alone.

Weights and cache are counted to the byte as loading makes them. Activations are an estimate: those of reading the
whole context at once. Tokens per second are an estimate too, from the bandwidth that is measured on the spot.
"""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path

from fewbits.errors import FewbitsError
from fewbits.formats.precisions import StoredPrecision
from fewbits.measure.plan_accuracy import ACCURACY
from fewbits.measure.plan_bytes import Size, bits_per_weight, cache_bytes, computed_bytes, read_bytes, weight_bytes
from fewbits.measure.plan_config import read_configuration
from fewbits.measure.plan_data import Plan, PlanRow, TrainingRow
from fewbits.measure.plan_memory import Memory, memories, read_bandwidth
from fewbits.measure.plan_model import Outline
from fewbits.measure.plan_training import TRAININGS, VECTOR_PARTS, Training
from fewbits.models.precision import PRECISIONS, Precision

CONTEXT = 4096
"""Tokens that are planned for where nothing is said, or the model's own limit if that is less."""

_BANDWIDTH_SHARE = {True: 0.3, False: 0.8}
_LAYER_SECONDS = {True: 1.0e-3, False: 1.0e-4}
"""Decode of a token takes bytes read / (share · bandwidth) + layers · seconds.

The share is less where a CPU multiplies casts of 16 bits; a layer takes more where it is PyTorch's modules, as in
casts. Fitted to the tables of BENCHMARKS.md: of the limit by bandwidth int8 reaches 0.49 with SmolLM2-135M (30 layers),
0.71 to 0.80 with 1.24B (16 layers), 0.78 with 6.2B (28).
"""

_UNBOUNDED = 1 << 24  # tokens: where neither the model nor its cache sets a limit


def plan(
    model: str | os.PathLike[str],
    *,
    memory: str | int | None = None,
    context: int | None = None,
    batch: int = 1,
    train: bool = False,
    revision: str | None = None,
    bandwidth: bool = True,
) -> Plan:
    """Find out what of a model fits, before any weight is downloaded.

    Args:
        model: A Hub id (only `config.json` is fetched), a folder with `config.json`, or a `.gguf` file.
        memory: Bytes, or a size such as ``24GiB``; None: this machine's RAM and GPUs.
        context: Tokens of each text; None: 4096, or the model's own limit if that is less.
        batch: Texts at once.
        train: Whether to plan training too.
        revision: Branch, tag or commit of a Hub id.
        bandwidth: Whether to measure how fast memory is read, which takes less than a second.

    Raises:
        FewbitsError: There is no such model, its configuration is broken or of an architecture that transformers does
            not know, a number is below 1, or the machine does not tell what memory it has and none is given.
    """
    for name, value in {"context": 1 if context is None else context, "batch": batch}.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise FewbitsError(f"{name} is {value!r}; a plan needs a whole number of at least 1")
    places = memories(memory)
    configuration = read_configuration(model, revision=revision)
    outline = Outline.of(configuration)
    tokens = context or min(CONTEXT, outline.limit or CONTEXT)
    speeds = {place.name: read_bandwidth(place.device) if bandwidth else None for place in places}
    planning = _Planning(outline, places, speeds, tokens, batch)
    rows = tuple(planning.rows())
    return Plan(
        model=configuration.name,
        architecture=outline.architecture,
        parameters=outline.size(PRECISIONS["fp32"]).parameters,
        context=tokens,
        context_limit=outline.limit,
        batch=batch,
        memories=places,
        bandwidth=speeds,
        rows=rows,
        trainings=tuple(planning.trainings()) if train else (),
        notes=tuple(planning.notes),
    )


class _Planning:
    """Rows of one model for some memories."""

    def __init__(
        self,
        outline: Outline,
        places: Sequence[Memory],
        speeds: dict[str, float | None],
        tokens: int,
        batch: int,
    ) -> None:
        self.outline, self.places, self.speeds, self.tokens, self.batch = outline, places, speeds, tokens, batch
        self.kept_bytes = outline.kept_dtype.itemsize
        self.notes = list(_notes(outline, tokens))

    def rows(self) -> list[PlanRow]:
        """The precisions that the model can be given; of a checkpoint that is quantized already, its own."""
        found = []
        for precision in _precisions(self.outline):
            try:
                size = self.outline.size(precision)
            except FewbitsError as error:
                self.notes.append(f"{precision.name} is left out: {error}")
                continue
            found.append(self._row(precision, size))
        return found

    def _row(self, precision: Precision, size: Size) -> PlanRow:
        stored, accuracy = self.outline.fit(precision), ACCURACY[precision.name]
        weights = weight_bytes(size, stored, self.kept_bytes)
        cache, small = (self.batch * self._cache(stored, self.tokens, int8=int8) for int8 in (False, True))
        activations = self._activations(stored, self.tokens)
        fits, fits_int8 = (
            [place for place in self.places if weights + held + activations <= place.nbytes] for held in (cache, small)
        )
        return PlanRow(
            precision=precision.name,
            bits_per_weight=bits_per_weight(size, stored, self.kept_bytes),
            weights=weights,
            cache=cache,
            cache_int8=small,
            activations=activations,
            fits=tuple(place.name for place in fits),
            fits_int8=tuple(place.name for place in fits_int8),
            longest_context=self._longest(stored, weights, int8=False),
            longest_context_int8=self._longest(stored, weights, int8=True),
            tokens_per_second=self._speed(size, stored, cache, (fits or self.places)[0]),
            accuracy=accuracy.name,
            kl=accuracy.kl,
            command=_command(self.outline, precision.name),
        )

    def _cache(self, stored: StoredPrecision, tokens: int, *, int8: bool) -> int:
        return cache_bytes(self.outline.cache, tokens, stored, int8=int8)

    def _activations(self, stored: StoredPrecision, tokens: int) -> int:
        """Of a pass over all tokens: the residual stream and its norm, three tensors inside the MLP; last logits."""
        outline = self.outline
        inside = self.batch * tokens * (2 * outline.hidden + 3 * outline.widest) * computed_bytes(stored)
        return inside + self.batch * outline.outputs * 4

    def _longest(self, stored: StoredPrecision, weights: int, *, int8: bool) -> int | None:
        """The most tokens of each text that fit in the largest memory."""
        room = max(place.nbytes for place in self.places) - weights

        def needs(tokens: int) -> int:
            return self.batch * self._cache(stored, tokens, int8=int8) + self._activations(stored, tokens)

        found = _largest(lambda tokens: needs(tokens) <= room, self.outline.limit or _UNBOUNDED)
        return None if found == _UNBOUNDED else found

    def _speed(self, size: Size, stored: StoredPrecision, cache: int, place: Memory) -> float | None:
        bandwidth = self.speeds[place.name]
        if bandwidth is None or not self.outline.writes:
            return None
        nbytes = read_bytes(size, stored, self.kept_bytes) + cache
        slow = computed_bytes(stored) == 2 and place.device == "cpu"
        seconds = nbytes / (_BANDWIDTH_SHARE[slow] * bandwidth) + self.outline.layers * _LAYER_SECONDS[stored.cast]
        return 1 / seconds

    def trainings(self) -> list[TrainingRow]:
        """Ways of training all weights."""
        if self.outline.configuration.schemes is not None:
            self.notes.append("training is left out: the checkpoint is quantized; train the model it was made from")
            return []
        return [self._training(training) for training in TRAININGS]

    def _training(self, training: Training) -> TrainingRow:
        size = self.outline.size(PRECISIONS["fp32"])
        vectors = sum(each.numel() for each in self.outline.model.parameters() if each.ndim < 2)
        head = 0 if size.head is None or size.tied else size.head.numbers
        multiplied = sum(matrix.numbers for matrix in size.layers) + head + (size.table if size.tied else 0)
        others = size.parameters - multiplied - vectors
        parts = {
            what: int(each * multiplied + other * others + vector * vectors)
            for (what, each), (_, other), (_, vector) in zip(
                training.parts, training.other_parts, VECTOR_PARTS, strict=True
            )
        }
        activations = self._saved(training)
        total = sum(parts.values()) + activations
        return TrainingRow(
            name=training.name,
            bytes_per_parameter=sum(parts.values()) / size.parameters,
            weights=parts["weights"],
            low_precision_copy=parts["low-precision copy"],
            gradients=parts["gradients"],
            state=parts["optimizer state"],
            activations=activations,
            fits=tuple(place.name for place in self.places if total <= place.nbytes),
            command=training.command(shlex.quote(self.outline.configuration.name)),
        )

    def _saved(self, training: Training) -> int:
        """Kept for the backward pass: what goes into and out of linear layers, norms in float32, logits thrice."""
        outline = self.outline
        norms = 20 * outline.hidden * outline.layers  # two norms, and what they multiply, in float32
        each = training.computed_bytes * outline.spread + norms + 12 * outline.outputs
        return int(self.batch * self.tokens * each)


def _precisions(outline: Outline) -> list[Precision]:
    """All that a model can be given; of a checkpoint that is quantized already, what most of its layers are."""
    if outline.configuration.schemes is None:
        return list(PRECISIONS.values())
    return [outline.stored or PRECISIONS["bf16"]]


def _notes(outline: Outline, tokens: int) -> list[str]:
    configuration, limit = outline.configuration, outline.limit
    notes = []
    if configuration.names_no_architecture:
        notes.append(f"config.json names no architecture; taken as {outline.architecture}")
    if limit is not None and tokens > limit:
        notes.append(f"a context of {tokens:,} is beyond the model's own limit of {limit:,} tokens")
    if configuration.schemes is not None:
        notes.append("the checkpoint is quantized already; for other precisions, plan the model it was made from")
    if not outline.cache:
        kind = "a state of fixed size, which is not counted" if outline.writes_otherwise else "no keys and values"
        notes.append(f"{outline.architecture} keeps {kind}")
    return notes


def _largest(fits: Callable[[int], bool], most: int) -> int:
    """The largest number from 0 to ``most`` that fits, if all below it do; 0 if 1 does not."""
    low, high = 0, most
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low


def _command(outline: Outline, precision: str) -> str:
    """What to run next for a precision: a conversion, or where there is nothing to convert, the model itself."""
    configuration = outline.configuration
    model, name = shlex.quote(configuration.name), Path(configuration.name).name.removesuffix(".gguf")
    chosen = "" if configuration.schemes is not None else precision
    if outline.writes and (not chosen or PRECISIONS[precision].cast or precision == "nf4"):  # no layout has nf4
        return f'fewbits generate {model} "Hello"' + (f" --precision {chosen}" if chosen else "")
    if not chosen or precision == "nf4":
        keyword = f', precision="{chosen}"' if chosen else ""
        return f"fewbits.AutoModel.from_pretrained({json.dumps(configuration.name)}{keyword})"
    method = " --method gptq" if precision == "int4" else ""
    return f"fewbits convert {model} {shlex.quote(f'{name}-{precision}')} --to {precision}{method}"
