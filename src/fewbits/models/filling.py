"""The tensors of a source as transformers takes them: read, and quantized, only when their turn comes."""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Callable, Mapping
from functools import partial
from types import EllipsisType

import torch
import transformers
from torch import Tensor

from fewbits.errors import FewbitsError
from fewbits.models.naming import Place, converted
from fewbits.models.precision import PRECISIONS, cast_weight
from fewbits.models.quantizable import Weight, output_head, quantizable_weights
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
    quantized: dict[str, dict[str, Place]] = defaultdict(dict)
    tensors: dict[str, LazyTensor] = {}
    for name, place in places.items():
        if place.parameter in plan.parameters:
            quantized[place.parameter][name] = place
        else:
            tensors[name] = LazyTensor(partial(_read_kept, reader, name, plan.kept))
    weights, head = quantizable_weights(empty), output_head(empty)
    for parameter, stored in quantized.items():
        make = _Once(_maker(reader, weights[parameter], stored, plan, empty, is_head=parameter == head))
        tensors[parameter] = LazyTensor(partial(make.take, "codes"))
        tensors[f"{parameter}_scale"] = LazyTensor(partial(make.take, "scales"))
    return tensors


class _Once:
    """Makes a weight when one of its two tensors is first asked for, and forgets it when it has given both."""

    def __init__(self, make: Callable[[], QuantizedTensor]) -> None:
        self._make = make
        self._left: dict[str, Tensor] = {}

    def take(self, part: str) -> Tensor:
        if not self._left:
            made = self._make()
            self._left = {"codes": made.codes.view(torch.int8), "scales": made.scales}
        return self._left.pop(part)


def _maker(
    reader: _Reader,
    weight: Weight,
    stored: Mapping[str, Place],
    plan: Plan,
    empty: transformers.PreTrainedModel,
    *,
    is_head: bool,
) -> Callable[[], QuantizedTensor]:
    """What gives a weight as codes and scales, read or made."""
    source, precision = reader.source, plan.precision
    wanted = PRECISIONS["int8"] if is_head else precision
    ready = isinstance(source, QuantizedSource) and all(source.holds(name, wanted) for name in stored)
    name, place = next(iter(stored.items()))

    def read() -> QuantizedTensor:
        if place.converter is None:
            return reader.read_quantized(name)
        parts = {each: reader.read_quantized(each) for each in stored}
        codes = converted(stored, lambda each: parts[each].codes, empty.config)[weight.parameter]
        scales = converted(stored, lambda each: parts[each].scales, empty.config)[weight.parameter]
        return QuantizedTensor(codes, scales, precision.weights.name)

    def make() -> QuantizedTensor:
        if place.converter is None:
            tensor = reader.read(name)
        else:
            tensor = converted(stored, reader.read, empty.config)[weight.parameter]
        if is_head:  # from the numbers that a converted folder holds
            return _quantize(source, name, cast_weight(name, tensor, plan.kept), "int8", None, plan.kept)
        rows = weight.as_rows(tensor)
        return _quantize(source, name, rows, precision.weights.name, precision.group_size, plan.kept)

    return read if ready else make


def _quantize(
    source: Source, name: str, rows: Tensor, format_name: str, group_size: int | None, kept: torch.dtype
) -> QuantizedTensor:
    *lead, K = rows.shape
    try:
        weight = quantize_weight(rows.reshape(-1, K), format_name, group_size=group_size, scale_dtype=kept)
    except FewbitsError as error:
        raise FewbitsError(f"{source.path}: {name}: {error}") from None
    return weight.view(*lead)


def _read_kept(reader: _Reader, name: str, dtype: torch.dtype) -> Tensor:
    tensor = reader.read(name)
    return cast_weight(name, tensor, dtype) if tensor.is_floating_point() else tensor


def _read_checked(reader: _Reader, name: str, dtype: torch.dtype) -> Tensor:
    """The tensor itself; transformers casts it, and to a wider dtype where the model wants one."""
    tensor = reader.read(name)
    if tensor.is_floating_point() and tensor.dtype != dtype:
        cast_weight(name, tensor, dtype)
    return tensor
