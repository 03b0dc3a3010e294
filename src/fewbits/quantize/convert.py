"""Convert a model on disk to another precision: manifest first, then tensor by tensor from source to output.

Never more than one tensor is held, in the source's precision and in the new one.
"""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path

import torch
import transformers
from torch import Tensor

from fewbits.errors import FewbitsError
from fewbits.models.fill import check_tensors
from fewbits.models.layouts import compressed_tensors
from fewbits.models.load import Progress, empty_model, nominal_dtype, stored_precision
from fewbits.models.manifest import ManifestRow, make_manifest
from fewbits.models.precision import TORCH_DTYPES, Precision, cast_weight, precision_named
from fewbits.models.safetensors_writer import SafetensorsWriter
from fewbits.models.source import Source, open_source
from fewbits.models.staging import MARK, staged_folder
from fewbits.tensors.cast_report import CastReport, cast_and_report
from fewbits.tensors.quantized import quantize_per_channel

LAYOUTS = ("compressed-tensors",)
_NAMED = 5  # more tensors that an error names, after the first


@dataclass(frozen=True)
class Conversion:
    """What a conversion wrote.

    Attributes:
        path: The folder.
        precision: The precision's name.
        nbytes: Bytes of all tensors.
        manifest: Each tensor's format, bytes, or why it is kept.
        casts: Of a cast, what it did to each tensor; empty if layers were quantized.
    """

    path: Path
    precision: str
    nbytes: int
    manifest: tuple[ManifestRow, ...]
    casts: tuple[CastReport, ...] = ()


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
    on_manifest: Callable[[Sequence[ManifestRow]], None] | None = None,
    progress: Progress | None = None,
) -> Conversion:
    """Write a model in another precision.

    Args:
        source: Hub id, folder or ``.gguf`` file.
        out: The folder to write; it appears when it is complete.
        to: ``int8`` (8-bit weights and activations), or a cast: ``bf16``, ``fp16``, ``fp32``.
        layout: How it is written; ``compressed-tensors`` (transformers and vLLM read it).
        keep: Patterns of module names that are not quantized (``*`` matches anything).
        overflow: What a cast does with values beyond the new format: ``saturate`` writes its largest number, ``ieee``
            Inf; None refuses the model and names its tensors that have such values.
        overwrite: Replace ``out`` if it holds a model.
        revision: Branch, tag or commit of a Hub id.
        on_manifest: Called with the manifest before any work.
        progress: Called with bytes written and bytes in all.

    Raises:
        FewbitsError: If the source cannot be read or is quantized already, a name or pattern is unknown, a weight
            holds NaN or Inf or a value beyond the new format, or ``out`` is not free.
        OSError: If the output cannot be written. Nothing is left behind then.
    """
    precision = precision_named(to)
    if layout not in LAYOUTS:
        raise FewbitsError(f"layout {layout!r} is unknown; known: {', '.join(LAYOUTS)}")
    if keep and precision.cast:
        raise FewbitsError(f"keep: a cast to {to} quantizes nothing that could be kept; leave --keep out")
    if overflow is not None and not precision.cast:
        raise FewbitsError(f"overflow={overflow!r} is of casts, and {to} has scales: leave it out")
    precision.weights.overflow_rule(overflow)
    opened = open_source(source, revision=revision)
    stored = stored_precision(opened)
    if stored is not None:
        raise FewbitsError(f"{opened.path} is {stored.name} already; convert the model that it was made from")
    dtype = TORCH_DTYPES[precision.name] if precision.cast else nominal_dtype(opened)
    model = empty_model(opened.config, dtype)
    shapes = {name: tensor.shape for name, tensor in opened.tensors.items()}
    check_tensors(model, shapes, opened.path)
    manifest = make_manifest(model, shapes, precision, dtype=dtype, keep=keep)
    tokenizer = opened.tokenizer()
    out = Path(out)
    nbytes = sum(row.nbytes for row in manifest)
    with staged_folder(out, overwrite=overwrite, nbytes=nbytes) as folder:
        if on_manifest is not None:
            on_manifest(manifest)
        _write_config(opened, model, precision, dtype, manifest, folder)
        casts = _write_tensors(opened, manifest, precision, dtype, overflow, folder / "model.safetensors", progress)
        tokenizer.save_pretrained(folder)
        mark = {"fewbits": version("fewbits"), "source": opened.path.name, "to": to, "layout": layout}
        lists = {"manifest": [asdict(row) for row in manifest], "casts": [asdict(cast) for cast in casts]}
        (folder / MARK).write_text(json.dumps({**mark, "nbytes": nbytes, **lists}, indent=1) + "\n")
    return Conversion(out, to, nbytes, tuple(manifest), tuple(casts))


def _write_config(
    source: Source,
    model: transformers.PreTrainedModel,
    precision: Precision,
    dtype: torch.dtype,
    manifest: Sequence[ManifestRow],
    folder: Path,
) -> None:
    config = copy.deepcopy(source.config)
    config.dtype = dtype
    config.architectures = config.architectures or [type(model).__name__]
    if not precision.cast:
        quantized = {row.module for row in manifest if row.reason is None}
        linears = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
        ignore = [name for name in linears if name not in quantized]
        config.quantization_config = compressed_tensors.quantization_config(precision, ignore)
    config.save_pretrained(folder)
    generation_config = source.generation_config()
    if generation_config is not None:
        generation_config.save_pretrained(folder)


def _write_tensors(
    source: Source,
    manifest: Sequence[ManifestRow],
    precision: Precision,
    dtype: torch.dtype,
    overflow: str | None,
    path: Path,
    progress: Progress | None,
) -> list[CastReport]:
    declared: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
    for row in manifest:
        quantized = not precision.cast and row.reason is None
        as_kept = {row.tensor: (dtype, row.shape)}
        declared |= compressed_tensors.stored_tensors(row.tensor, row.shape, dtype) if quantized else as_kept
    casts: list[CastReport] = []
    refused: dict[str, float] = {}
    done, total = 0, sum(row.nbytes for row in manifest)
    with SafetensorsWriter(path, ((name, *what) for name, what in declared.items())) as writer:
        for row in manifest:
            tensor = source.read(row.tensor)
            if precision.cast:
                values, report = cast_and_report(row.tensor, tensor, precision.name, overflow)
                casts.append(report)
                if report.overflowed and overflow is None:
                    refused[row.tensor] = _largest_finite(tensor)
                if not refused:  # else the rest is only looked at, to name all that overflows
                    writer.write(row.tensor, values)
            elif row.reason is not None:
                writer.write(row.tensor, cast_weight(row.tensor, tensor, dtype))
            else:
                _write_quantized(writer, row.tensor, tensor, dtype)
            done += row.nbytes
            if progress is not None:
                progress(done, total)
        if refused:
            raise FewbitsError(_why_refused(refused, precision))
    return casts


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


def _write_quantized(writer: SafetensorsWriter, name: str, weight: Tensor, dtype: torch.dtype) -> None:
    try:
        quantized = quantize_per_channel(weight, scale_dtype=dtype)
    except FewbitsError as error:
        raise FewbitsError(f"{name}: {error}") from None
    writer.write(name, quantized.codes)
    writer.write(compressed_tensors.scale_name(name), quantized.scales)
