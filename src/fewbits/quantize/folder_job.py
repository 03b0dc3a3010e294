"""Write a converted model as a folder: configuration, tensors one after the other, in a layout of folders.

While one tensor is written the next one is made. No more than these two are held at a time.
"""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Callable, Generator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import TypeVar

import torch
import transformers
from torch import Tensor
from transformers.pytorch_utils import Conv1D

from fewbits.errors import FewbitsError
from fewbits.models.filling import Progress
from fewbits.models.layouts import compressed_tensors
from fewbits.models.manifest import ManifestRow
from fewbits.models.naming import Place
from fewbits.models.precision import Precision, cast_weight
from fewbits.models.quantizable import Weight
from fewbits.models.quantized_source import QuantizedSource
from fewbits.models.resumable import Resumable
from fewbits.models.safetensors_writer import SafetensorsWriter
from fewbits.models.source import Source
from fewbits.quantize.calibrate import Calibration
from fewbits.quantize.candidates import Candidates
from fewbits.quantize.folding import FoldedSource
from fewbits.quantize.least_error import least_error
from fewbits.tensors.cast_report import CastReport, cast_and_report
from fewbits.tensors.quantized import QuantizedTensor, quantize_weight

_Item = TypeVar("_Item")
_Made = TypeVar("_Made")


@dataclass(frozen=True)
class FolderJob:
    """A folder to write: what goes into it, and how.

    Attributes:
        source: The model.
        layout: How quantized weights are stored: a module as ``FOLDER_LAYOUTS`` has them.
        precision: What they become, groups fitted; where they differ, one of them.
        dtype: What the rest is stored in, and the scales.
        manifest: What happens to each tensor.
        places: Where each stored tensor goes in the model.
        weights: Of each tensor that is a quantizable weight, what it is.
        overflow: What a cast does with values beyond the format; None: the format's own rule.
        allow_nonfinite: Whether NaN and Inf may be written where the source has them.
        method: How codes and scales are found; see ``convert``.
        calibration: What gives the weights of blocks, with gptq.
        mixed: What each module becomes, where they differ; None: all become the same.
        candidates: What gives quantized weights, made before.
    """

    source: Source
    layout: ModuleType
    precision: Precision
    dtype: torch.dtype
    manifest: Sequence[ManifestRow]
    places: Mapping[str, Place]
    weights: Mapping[str, Weight]
    overflow: str | None
    allow_nonfinite: bool
    method: str = "absmax"
    calibration: Calibration | None = None
    mixed: Mapping[str, Precision] | None = None
    candidates: Candidates | None = None

    def write_config(self, model: transformers.PreTrainedModel, folder: Path) -> None:
        """Write what transformers reads before it reads weights."""
        config = copy.deepcopy(self.source.config)
        config.dtype = self.dtype
        config.architectures = config.architectures or [type(model).__name__]
        if hasattr(config, "quantization_config"):
            del config.quantization_config
        if not self.precision.cast:
            layers = self._layers()
            quantized = {name for names in layers.values() for name in names}
            linears = [name for name, module in model.named_modules() if isinstance(module, (torch.nn.Linear, Conv1D))]
            ignore = [name for name in linears if name not in quantized]
            if len(layers) > 1:
                config.quantization_config = self.layout.mixed_config(layers, ignore)
            else:
                config.quantization_config = self.layout.quantization_config(next(iter(layers)), ignore)
            if isinstance(self.source, FoldedSource) and self.layout is compressed_tensors:
                config.quantization_config = compressed_tensors.with_folded(
                    config.quantization_config, self.source.rotated
                )
        config.save_pretrained(folder)
        generation_config = self.source.generation_config()
        if generation_config is not None:
            generation_config.save_pretrained(folder)

    def _layers(self) -> dict[Precision, list[str]]:
        """The layers of each precision by the model's names, and by those of the checkpoint where they are others."""
        found: dict[Precision, dict[str, None]] = {}
        for row in self.manifest:
            if row.reason is None:
                names = [*self.places[row.tensor].parameters(), *([row.tensor] if self.mixed else ())]
                modules = {name.removesuffix(".weight"): None for name in names}
                found.setdefault(self._precision(row.tensor), {}).update(modules)
        return {precision: list(names) for precision, names in found.items()}

    def _precision(self, name: str) -> Precision:
        """What a weight becomes."""
        return self.precision if self.mixed is None else self.mixed[self.weights[name].module]

    def write_tensors(self, path: Path, progress: Progress | None) -> list[CastReport]:
        """Write tensor by tensor; return what a cast did to each."""
        casts: list[CastReport] = []
        done, total = 0, sum(row.nbytes for row in self.manifest)
        declared = ((name, *what) for name, what in self._declared().items())
        with (
            Resumable(path.parent) as record,
            SafetensorsWriter(path, declared, record) as writer,
            closing(_one_ahead(self._made, [row for row in self.manifest if not record.done(row.tensor)])) as made,
        ):
            if self.calibration is not None:
                self.calibration.resume(path.parent, record.done)
            for row, following in zip(self.manifest, [*self.manifest[1:], None], strict=True):
                done += row.nbytes
                if record.done(row.tensor):
                    casts += [CastReport(**report) for report in record.extra(row.tensor)]
                    continue
                tensors, report = next(made)
                for name, tensor in tensors.items():
                    writer.write(name, tensor)
                casts += report
                record.record(row.tensor, [asdict(cast) for cast in report])
                self._record_block(record, row, following)
                if progress is not None:
                    progress(done, total)
            if self.calibration is not None:
                self.calibration.forget()
        return casts

    def _record_block(self, record: Resumable, row: ManifestRow, following: ManifestRow | None) -> None:
        """After the last tensor of a calibrated block: record what the next block is given."""
        if self.calibration is None or following is None:
            return
        index = self.calibration.block_of(following.tensor)
        if index and index != self.calibration.block_of(row.tensor):
            kept = self.calibration.kept_for(index)
            record.wrote(kept, "inputs", 0)
            record.record(kept)
            record.flush()
            self.calibration.forget(index)

    def _made(self, row: ManifestRow) -> tuple[dict[str, Tensor], list[CastReport]]:
        """What is stored for one tensor, and what a cast did to it."""
        if self.precision.cast:
            values, report = cast_and_report(row.tensor, self._finite(row), self.precision.name, self.overflow)
            return {row.tensor: values}, [report]
        if row.reason is not None:
            return {row.tensor: cast_weight(row.tensor, self._finite(row), self.dtype)}, []
        return self.layout.store(row.tensor, self._quantized(row), self._precision(row.tensor)), []

    def _finite(self, row: ManifestRow) -> Tensor:
        """A tensor that is not quantized."""
        tensor = self.source.read(row.tensor)
        if self._comes_as_rows(row.tensor):
            tensor = self.weights[row.tensor].as_rows(tensor)
        if not tensor.is_floating_point():
            raise FewbitsError(f"{row.tensor} is {tensor.dtype}, no floats; it cannot be cast: remove it")
        if self.allow_nonfinite or tensor.numel() == 0 or all(end.isfinite() for end in tensor.aminmax()):
            return tensor
        count = int((~tensor.isfinite()).sum())
        raise FewbitsError(
            f"{row.tensor}: {count} of {tensor.numel()} values are NaN or Inf; repair the checkpoint, or pass "
            "allow_nonfinite (--allow-nonfinite) to write them as they are"
        )

    def _declared(self) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        declared: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
        for row in self.manifest:
            if self.precision.cast or row.reason is not None:
                declared[row.tensor] = (self.dtype, row.shape)
            else:
                shape, dtype = self.weights[row.tensor].rows(row.shape), self._scale_dtype(row.tensor)
                declared |= self.layout.entries(row.tensor, shape, self._precision(row.tensor), dtype)
        return declared

    def _comes_as_rows(self, name: str) -> bool:
        """Whether a weight is stored with input features last, whatever the model's way is."""
        return isinstance(self.source, QuantizedSource) and name in self.source.weights and name in self.weights

    def _is_taken_over(self, name: str) -> bool:
        """Whether codes and scales are written as they are read."""
        if not isinstance(self.source, QuantizedSource) or name not in self.source.weights or self.method != "absmax":
            return False
        return self.source.precisions[name].stores_as(self._precision(name))

    def _scale_dtype(self, name: str) -> torch.dtype:
        """The dtype of a weight's scales: as they are where codes are taken over, else what the layout wants."""
        if isinstance(self.source, QuantizedSource) and self._is_taken_over(name):
            return self.source.scale_dtype
        return self.layout.SCALES or self.dtype

    def _quantized(self, row: ManifestRow) -> QuantizedTensor:
        name, dtype, precision = row.tensor, self._scale_dtype(row.tensor), self._precision(row.tensor)
        if isinstance(self.source, QuantizedSource) and self._is_taken_over(name):
            weight = self.source.read_quantized(name)
            return replace(weight, scales=weight.scales.to(dtype))
        if self.candidates is not None and self.candidates.holds(name):
            return self.candidates.read(name, precision)
        if self.calibration is not None and self.calibration.holds(name):
            return self.calibration.take(name)
        tensor = self.source.read(name)
        rows = tensor if self._comes_as_rows(name) else self.weights[name].as_rows(tensor)
        *lead, K = rows.shape
        try:
            made = (quantize_weight if self.method == "absmax" else least_error)(
                rows.reshape(-1, K),
                precision.weights.name,
                group_size=precision.group_size,
                scale_dtype=dtype,
                rotation=precision.rotation(K),
            )
        except FewbitsError as error:
            raise FewbitsError(f"{name}: {error}") from None
        return made.view(*lead)


def _one_ahead(make: Callable[[_Item], _Made], items: Sequence[_Item]) -> Generator[_Made]:
    """Make each item in a thread of its own, while the one before it is in use."""
    with ThreadPoolExecutor(1) as thread:
        coming: deque[Future[_Made]] = deque()
        for item in items:
            coming.append(thread.submit(make, item))
            if len(coming) > 1:
                yield coming.popleft().result()
        if coming:
            yield coming.popleft().result()
