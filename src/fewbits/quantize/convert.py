"""Convert a model on disk to another precision: manifest first, then tensor by tensor from source to output.

Never more than one tensor is held, in the source's precision and in the new one.
"""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from types import ModuleType

import torch
import transformers
from torch import Tensor

from fewbits.errors import FewbitsError
from fewbits.models.filling import Progress
from fewbits.models.layouts.gguf import gguf_type
from fewbits.models.load import auto_class_of, empty_model, nominal_dtype
from fewbits.models.manifest import ManifestRow, fitted, make_manifest
from fewbits.models.naming import check_tensors
from fewbits.models.precision import TORCH_DTYPES, Precision, cast_weight, precision_named
from fewbits.models.quantizable import Weight, quantizable_weights
from fewbits.models.quantized_source import FOLDER_LAYOUTS, QuantizedSource, as_weights
from fewbits.models.resumable import Resumable, fingerprint
from fewbits.models.safetensors_writer import SafetensorsWriter
from fewbits.models.source import Source, open_source
from fewbits.models.staging import MARK, staged_folder
from fewbits.quantize.conversion import Conversion, told_rounding
from fewbits.quantize.to_gguf import convert_to_gguf
from fewbits.tensors.cast_report import CastReport, cast_and_report
from fewbits.tensors.quantized import QuantizedTensor, quantize_weight

GGUF = "gguf"
_NAMED = 5  # more tensors that an error names, after the first


def convert(
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    to: str = "int8",
    *,
    layout: str = "compressed-tensors",
    keep: Sequence[str] = (),
    overflow: str | None = None,
    overwrite: bool = False,
    revision: str | None = None,
    trust_remote_code: bool = False,
    on_manifest: Callable[[Sequence[ManifestRow]], None] | None = None,
    progress: Progress | None = None,
) -> Conversion:
    """Write a model in another precision.

    Args:
        source: Hub id, folder or ``.gguf`` file.
        out: The folder to write (of GGUF, the file); it appears when it is complete.
        to: ``int8`` (8-bit weights and activations), ``int8-weight``, ``int4``, ``fp8``, or a cast: ``bf16``, ``fp16``,
            ``fp32``. In GGUF, int8 is Q8_0 and int4 Q4_0; its own types can be named too.
        layout: How it is written: ``compressed-tensors`` (transformers and vLLM read it), ``bitsandbytes``, ``gguf``.
        keep: Patterns of module names that are not quantized (``*`` matches anything).
        overflow: What a cast does with values beyond the new format: ``saturate`` writes its largest number, ``ieee``
            Inf; None refuses the model and names its tensors that have such values.
        overwrite: Replace ``out`` if it holds a model.
        revision: Branch, tag or commit of a Hub id.
        trust_remote_code: Run the model's own code, where transformers does not know its type.
        on_manifest: Called with the manifest before any work.
        progress: Called with bytes written and bytes in all.

    Raises:
        FewbitsError: If the source cannot be read or is quantized already, a name or pattern is unknown, a weight
            holds NaN or Inf or a value beyond the new format, or ``out`` is not free.
        OSError: If the output cannot be written. Nothing is left behind then.
        KeyboardInterrupt: What is done is kept, as after a kill: the same conversion, run again, goes on there.
    """
    out = Path(out)
    if layout == GGUF:
        _refuse_for_gguf(to, keep, overflow)
        opened = as_weights(open_source(source, revision=revision, trust_remote_code=trust_remote_code))
        return convert_to_gguf(opened, out, to, overwrite=overwrite, on_manifest=on_manifest, progress=progress)
    precision = precision_named(to)
    if layout not in FOLDER_LAYOUTS:
        raise FewbitsError(f"layout {layout!r} is unknown; known: {', '.join([*FOLDER_LAYOUTS, GGUF])}")
    _check_options(precision, layout, keep, overflow)
    opened = as_weights(open_source(source, revision=revision, trust_remote_code=trust_remote_code))
    dtype = TORCH_DTYPES[precision.name] if precision.cast else nominal_dtype(opened)
    model = empty_model(opened.config, dtype, auto_class_of(opened.config))
    shapes = {name: tensor.shape for name, tensor in opened.tensors.items()}
    places = check_tensors(model, shapes, opened.path)
    precision = fitted(model, precision)
    rounding = _rounding(opened, precision, layout)
    manifest = make_manifest(model, shapes, places, precision, dtype=dtype, keep=keep)
    tokenizer = opened.tokenizer()
    nbytes = sum(row.nbytes for row in manifest)
    weights = quantizable_weights(model)
    by_tensor = {name: weights[place.parameter] for name, place in places.items() if place.parameter in weights}
    job = _Job(opened, FOLDER_LAYOUTS[layout], precision, dtype, manifest, by_tensor, overflow)
    work = fingerprint(opened, to=to, layout=layout, keep=[*keep], overflow=overflow)
    with staged_folder(out, overwrite=overwrite, nbytes=nbytes, fingerprint=work) as folder:
        if on_manifest is not None:
            on_manifest(manifest)
        job.write_config(model, folder)
        casts = job.write_tensors(folder / "model.safetensors", progress)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        mark = {"fewbits": version("fewbits"), "source": opened.path.name, "to": to, "layout": layout}
        lists = {"manifest": [asdict(row) for row in manifest], "casts": [asdict(cast) for cast in casts]}
        (folder / MARK).write_text(json.dumps({**mark, "nbytes": nbytes, **lists}, indent=1) + "\n")
    return Conversion(out, to, nbytes, tuple(manifest), tuple(casts), rounding)


def _refuse_for_gguf(to: str, keep: Sequence[str], overflow: str | None) -> None:
    gguf_type(to)
    if keep:
        raise FewbitsError(f"keep: a GGUF file has one type of matrices; leave --keep out ({', '.join(keep)})")
    if overflow is not None:
        raise FewbitsError(f"overflow={overflow!r}: GGUF files are refused where values overflow; leave it out")


def _check_options(precision: Precision, layout: str, keep: Sequence[str], overflow: str | None) -> None:
    can = FOLDER_LAYOUTS[layout].WRITES
    if not precision.cast and precision.name not in can:
        others = [name for name, module in FOLDER_LAYOUTS.items() if precision.name in module.WRITES]
        remedy = f"--layout {others[0]} can" if others else "it can be loaded so, from the original, but not written"
        raise FewbitsError(f"{precision.name} cannot be written in the layout {layout} ({', '.join(can)}); {remedy}")
    if keep and precision.cast:
        raise FewbitsError(f"keep: a cast to {precision.name} quantizes nothing that could be kept; leave --keep out")
    if overflow is not None and not precision.cast:
        raise FewbitsError(f"overflow={overflow!r} is of casts, and {precision.name} has scales: leave it out")
    precision.weights.overflow_rule(overflow)


def _rounding(source: Source, precision: Precision, layout: str) -> str | None:
    if not isinstance(source, QuantizedSource):
        return None
    stored = source.precision
    if source.layout == layout and stored.name == precision.name:
        raise FewbitsError(f"{source.path} is {stored.name} already; convert the model that it was made from")
    same = (stored.weights, stored.group_size) == (precision.weights, precision.group_size)
    return told_rounding(source, precision.name, taken_over=same)


@dataclass(frozen=True)
class _Job:
    """What is written, and how."""

    source: Source
    layout: ModuleType
    precision: Precision
    dtype: torch.dtype
    manifest: Sequence[ManifestRow]
    weights: Mapping[str, Weight]
    overflow: str | None

    def write_config(self, model: transformers.PreTrainedModel, folder: Path) -> None:
        """Write what transformers reads before it reads weights."""
        config = copy.deepcopy(self.source.config)
        config.dtype = self.dtype
        config.architectures = config.architectures or [type(model).__name__]
        if hasattr(config, "quantization_config"):
            del config.quantization_config
        if not self.precision.cast:
            quantized = {self.weights[row.tensor].module for row in self.manifest if row.reason is None}
            linears = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
            ignore = [name for name in linears if name not in quantized]
            config.quantization_config = self.layout.quantization_config(self.precision, ignore)
        config.save_pretrained(folder)
        generation_config = self.source.generation_config()
        if generation_config is not None:
            generation_config.save_pretrained(folder)

    def write_tensors(self, path: Path, progress: Progress | None) -> list[CastReport]:
        """Write tensor by tensor; return what a cast did to each."""
        casts: list[CastReport] = []
        refused: dict[str, float] = {}
        done, total = 0, sum(row.nbytes for row in self.manifest)
        tensors = ((name, *what) for name, what in self._declared().items())
        with Resumable(path.parent) as record, SafetensorsWriter(path, tensors, record) as writer:
            for row in self.manifest:
                if record.done(row.tensor):
                    casts += [CastReport(**report) for report in record.extra(row.tensor)]
                    done += row.nbytes
                    continue
                if self.precision.cast:
                    tensor = self.source.read(row.tensor)
                    values, report = cast_and_report(row.tensor, tensor, self.precision.name, self.overflow)
                    casts.append(report)
                    if report.overflowed and self.overflow is None:
                        refused[row.tensor] = _largest_finite(tensor)
                    if not refused:  # else the rest is only looked at, to name all that overflows
                        writer.write(row.tensor, values)
                elif row.reason is not None:
                    writer.write(row.tensor, cast_weight(row.tensor, self.source.read(row.tensor), self.dtype))
                else:
                    for name, stored in self.layout.store(row.tensor, self._quantized(row)).items():
                        writer.write(name, stored)
                if not refused:
                    record.record(row.tensor, [asdict(cast) for cast in casts[-1:]])
                done += row.nbytes
                if progress is not None:
                    progress(done, total)
            if refused:
                raise FewbitsError(_why_refused(refused, self.precision))
        return casts

    def _declared(self) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        declared: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
        for row in self.manifest:
            if self.precision.cast or row.reason is not None:
                declared[row.tensor] = (self.dtype, row.shape)
            else:
                shape = self._rows(row)
                declared |= self.layout.entries(row.tensor, shape, self.precision, self.dtype)
        return declared

    def _rows(self, row: ManifestRow) -> tuple[int, ...]:
        """The shape of a quantized weight, input features last."""
        return row.shape if self._is_quantized(row.tensor) else self.weights[row.tensor].rows(row.shape)

    def _is_quantized(self, name: str) -> bool:
        return isinstance(self.source, QuantizedSource) and name in self.source.weights

    def _quantized(self, row: ManifestRow) -> QuantizedTensor:
        weights, group = self.precision.weights, self.precision.group_size
        if isinstance(self.source, QuantizedSource) and row.tensor in self.source.weights:
            stored = self.source.precision
            if (stored.weights, stored.group_size) == (weights, group):
                return self.source.read_quantized(row.tensor)
            rows = self.source.read(row.tensor)
        else:
            rows = self.weights[row.tensor].as_rows(self.source.read(row.tensor))
        *lead, K = rows.shape
        try:
            made = quantize_weight(rows.reshape(-1, K), weights.name, group_size=group, scale_dtype=self.dtype)
        except FewbitsError as error:
            raise FewbitsError(f"{row.tensor}: {error}") from None
        return made.view(*lead)


def _largest_finite(tensor: Tensor) -> float:
    return tensor.abs().nan_to_num(nan=0, posinf=0).max().item()


def _why_refused(beyond: dict[str, float], precision: Precision) -> str:
    (first, value), *others = beyond.items()
    wider = {"fp16": "use bf16 or fp32, or ", "bf16": "use fp32, or "}.get(precision.name, "")
    message = (
        f"{first}: {value:.6g} is beyond {precision.name}, whose largest number is {float(precision.weights.max):.6g}; "
        f"{wider}overflow='saturate' to take that number"
    )
    if not others:
        return message
    names = ", ".join(name for name, _ in others[:_NAMED]) + (", …" if len(others) > _NAMED else "")
    return f"{message}. As many as {len(beyond)} tensors overflow: also {names}"
