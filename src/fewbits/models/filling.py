"""The tensors of a source as transformers takes them: read, and quantized, only when their turn comes."""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from types import EllipsisType

import torch
import transformers
from torch import Tensor
from transformers.core_model_loading import dot_natural_key

from fewbits.errors import FewbitsError
from fewbits.models.naming import Place, conversion_keeps_rows, converted
from fewbits.models.precision import Precision, cast_weight, refuse_overflow
from fewbits.models.quantizable import output_head, quantizable_weights
from fewbits.models.quantized_source import QuantizedSource
from fewbits.models.quantizer import Plan
from fewbits.models.source import Source
from fewbits.tensors.quantized import QuantizedTensor, quantize_weight

Progress = Callable[[int, int], None]
"""Called with bytes done and bytes in all."""


class LazyTensor:
    """Stands for a tensor until it is sliced whole, which is when transformers wants it."""

    def __init__(self, read: Callable[[], Tensor]) -> None:
        self._read = read

    def __getitem__(self, everything: EllipsisType) -> Tensor:
        return self._read()


class _Reader:
    """Reads a source's tensors and tells how far it is; several threads may ask."""

    def __init__(self, source: Source, progress: Progress | None) -> None:
        self.source, self._progress = source, progress
        self._done, self._total = 0, sum(tensor.nbytes for tensor in source.tensors.values())
        self._told: set[str] = set()
        self._lock = threading.Lock()

    def read(self, name: str) -> Tensor:
        tensor = self.source.read(name)
        self._tell(name)
        return tensor

    def read_quantized(self, name: str) -> QuantizedTensor:
        assert isinstance(self.source, QuantizedSource)
        weight = self.source.read_quantized(name)
        self._tell(name)
        return weight

    def _tell(self, name: str) -> None:
        with self._lock:
            if name in self._told:  # a tensor in two places is read twice
                return
            self._told.add(name)
            self._done += self.source.tensors[name].nbytes
            if self._progress is not None:
                self._progress(self._done, self._total)


def plain_tensors(
    source: Source, places: Mapping[str, Place], dtype: torch.dtype, progress: Progress | None
) -> dict[str, LazyTensor]:
    """The tensors as they are stored, by their names in the checkpoint.

    Reading one raises a FewbitsError if it holds a finite value beyond ``dtype``.
    """
    reader = _Reader(source, progress)
    return {name: LazyTensor(partial(_read_checked, reader, name, dtype)) for name in places}


def quantized_tensors(
    source: Source,
    empty: transformers.PreTrainedModel,
    places: Mapping[str, Place],
    plan: Plan,
    progress: Progress | None,
) -> dict[str, LazyTensor]:
    """Codes and scales of what is quantized, by the model's names; the rest rounded to the dtype that it is kept in.

    What is not quantized is rounded as in a converted folder: both give the same model.
    """
    reader = _Reader(source, progress)
    together: dict[str, dict[str, Place]] = defaultdict(dict)
    tensors: dict[str, LazyTensor] = {}
    for name, place in places.items():
        if plan.parameters.isdisjoint(place.parameters()):
            tensors[name] = LazyTensor(partial(_read_kept, reader, name, plan.kept))
        else:
            together[place.parameter][name] = place
    maker = _Maker(reader, plan, empty)
    pool = ThreadPoolExecutor(max(1, torch.get_num_threads()), thread_name_prefix="fewbits-fill")
    made = [
        _Once(partial(maker.make, stored), next(iter(stored.values())).parameters(), pool)
        for stored in together.values()
    ]
    _look_ahead(made)
    for one in made:
        for name in one.names:
            tensors[name] = LazyTensor(partial(one.take, name))
    return tensors


class _Once:
    """Makes tensors when one of them is first asked for, and forgets each when it has given it.

    Those that will be asked for next are then begun by the threads beside. Several threads may ask.
    """

    def __init__(
        self, make: Callable[[], dict[str, Tensor]], parameters: Iterable[str], pool: ThreadPoolExecutor
    ) -> None:
        self._pool = pool
        self.names = [name for parameter in parameters for name in (parameter, f"{parameter}_scale")]
        self.next: list[_Once] = []
        self._make = make
        self._made: Future[dict[str, Tensor]] | None = None
        self._left: dict[str, Tensor] = {}
        self._lock = threading.Lock()

    def take(self, name: str) -> Tensor:
        """One of the tensors, made now if it was not begun."""
        with self._lock:
            if not self._left:
                self.begin()
                for other in self.next:
                    other.begin()
                assert self._made is not None
                self._left, self._made = self._made.result(), None
            return self._left.pop(name)

    def begin(self) -> None:
        """Have the tensors made by a thread beside, if that was not asked for already."""
        if self._made is None and not self._left:
            self._made = self._pool.submit(self._make)


def _look_ahead(made: list[_Once]) -> None:
    """Let each one begin those after it, as many as there are threads, in the order in which transformers asks."""
    made = sorted(made, key=lambda one: dot_natural_key(one.names[0]))
    for index, one in enumerate(made):
        one.next = made[index + 1 : index + 1 + torch.get_num_threads()]


class _Maker:
    """Makes quantized weights of what is stored."""

    def __init__(self, reader: _Reader, plan: Plan, empty: transformers.PreTrainedModel) -> None:
        self._reader, self._plan, self._empty = reader, plan, empty
        self._weights, self._head = quantizable_weights(empty), output_head(empty)

    def make(self, stored: Mapping[str, Place]) -> dict[str, Tensor]:
        """Codes and scales, by the model's names, of the weights that these stored tensors make together."""
        name, place = next(iter(stored.items()))
        if place.converter is None:
            made = {place.parameter: self._one(name, place.parameter)}
        elif conversion_keeps_rows(place.converter):  # then each part is quantized by itself: one at a time is held
            parts = {each: self._one(each, part.parameter) for each, part in stored.items()}
            codes = converted(stored, lambda each: parts[each].codes.view(torch.int8), self._empty)
            scales = converted(stored, lambda each: parts[each].scales, self._empty)
            made = {each: replace(parts[name], codes=codes[each], scales=scales[each]) for each in codes}
        else:
            values = converted(stored, self._reader.read, self._empty)
            made = {each: self._quantized(each, each, values[each]) for each in values}
        return {
            each: tensor
            for parameter, weight in made.items()
            for each, tensor in ((parameter, weight.codes.view(torch.int8)), (f"{parameter}_scale", weight.scales))
        }

    def _one(self, name: str, parameter: str) -> QuantizedTensor:
        """A stored tensor as it is, if it has codes of this kind, or quantized."""
        source = self._reader.source
        wanted = self._plan.precision.of_head if parameter == self._head else self._plan.of(parameter)
        if isinstance(source, QuantizedSource) and source.holds(name, wanted):
            return self._reader.read_quantized(name)
        return self._quantized(name, parameter, self._reader.read(name))

    def _quantized(self, name: str, parameter: str, tensor: Tensor) -> QuantizedTensor:
        source, kept, precision = self._reader.source, self._plan.kept, self._plan.of(parameter)
        if parameter == self._head:  # from the numbers that a converted folder holds
            return _quantize(source, name, cast_weight(name, tensor, kept), self._plan.precision.of_head, kept)
        rows = self._weights[parameter].as_rows(tensor)
        return _quantize(source, name, rows, precision, kept)


def _quantize(source: Source, name: str, rows: Tensor, precision: Precision, kept: torch.dtype) -> QuantizedTensor:
    *lead, K = rows.shape
    try:
        weight = quantize_weight(
            rows.reshape(-1, K), precision.weights.name,
            group_size=precision.group_size, scale_dtype=kept, rotation=precision.rotation(K), threads=1,
        )  # fmt: skip
    except FewbitsError as error:
        raise FewbitsError(f"{source.path}: {name}: {error}") from None
    return weight.view(*lead)


def _read_kept(reader: _Reader, name: str, dtype: torch.dtype) -> Tensor:
    tensor = reader.read(name)
    return cast_weight(name, tensor, dtype) if tensor.is_floating_point() else tensor


def _read_checked(reader: _Reader, name: str, dtype: torch.dtype) -> Tensor:
    """The tensor itself; transformers casts it, and to a wider dtype where the model wants one."""
    tensor = reader.read(name)
    if tensor.is_floating_point():
        refuse_overflow(name, tensor, dtype)
    return tensor
