"""Convert a model on disk to another precision: manifest first, then tensor by tensor from source to output.

Never more than one tensor is held, in the source's precision and in the new one.
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path

from transformers.core_model_loading import dot_natural_key

from fewbits.errors import FewbitsError, OverflowWarning
from fewbits.models.architecture import auto_class_of, empty_model
from fewbits.models.filling import Progress
from fewbits.models.layouts import compressed_tensors
from fewbits.models.layouts.gguf import gguf_type
from fewbits.models.manifest import ManifestRow, fitted, make_manifest
from fewbits.models.naming import check_tensors
from fewbits.models.precision import TORCH_DTYPES, Precision, precision_named
from fewbits.models.quantizable import quantizable_weights
from fewbits.models.quantized_source import FOLDER_LAYOUTS, QuantizedSource, as_weights
from fewbits.models.resumable import fingerprint
from fewbits.models.source import Source, open_source
from fewbits.models.staging import MARK, staged_folder
from fewbits.models.stored_dtype import nominal_dtype
from fewbits.models.text import read_text
from fewbits.quantize.calibrate import WINDOW_TOKENS, Calibration, calibration_windows
from fewbits.quantize.conversion import Conversion, told_rounding
from fewbits.quantize.folder_job import FolderJob
from fewbits.quantize.folding import FoldedSource
from fewbits.quantize.method import Method
from fewbits.quantize.quarot import quarot
from fewbits.quantize.recipe import Recipe
from fewbits.quantize.to_gguf import convert_to_gguf
from fewbits.tensors.cast_report import CastReport

GGUF = "gguf"


def convert(
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    to: str | Mapping[str, str] | Recipe = "int8",
    *,
    layout: str = "compressed-tensors",
    keep: Sequence[str] = (),
    rotate: bool = False,
    method: str | None = None,
    calibrate: str | os.PathLike[str] | None = None,
    overflow: str | None = None,
    allow_nonfinite: bool = False,
    overwrite: bool = False,
    revision: str | None = None,
    trust_remote_code: bool = False,
    on_manifest: Callable[[Sequence[ManifestRow]], None] | None = None,
    on_block: Callable[[int, int], None] | None = None,
    progress: Progress | None = None,
) -> Conversion:
    """Write a model in another precision.

    Args:
        source: Hub id, folder or ``.gguf`` file.
        out: The folder to write (of GGUF, the file); it appears when it is complete.
        to: ``int8`` (8-bit weights and activations), ``int8-weight``, ``int4``, ``fp8``, or a cast: ``bf16``, ``fp16``,
            ``fp32``. In GGUF, int8 is Q8_0 and int4 Q4_0; its own types can be named too. Or a recipe: precisions by
            patterns of module names, ``{"*.mlp.*": "int4", "*": "int8"}``, of which the first that matches counts.
        layout: How it is written: ``compressed-tensors`` (transformers and vLLM read it), ``bitsandbytes``, ``gguf``.
        keep: Patterns of module names that are not quantized (``*`` matches anything).
        rotate: Rotate weights before they are quantized, which makes int8 and int4 several times as accurate; only
            fewbits reads such a folder. Without it, fewbits rotates the weights of int8 when it loads them.
        method: How codes and scales are found: ``absmax``, the usual one: nothing is clipped; ``mse``: scales with the
            least squared error; ``gptq``: what layers give on some text is kept, rather than their weights. Joined to
            it by ``+``, what is folded into neighbouring weights before: ``quarot`` rotates them, for all readers.
        calibrate: A UTF-8 file with that text, which makes the method gptq; None: a built-in one.
        overflow: What a cast does with values beyond the new format: ``saturate`` writes its largest number, ``ieee``
            Inf; None: Inf where the format has it, else its largest number. Such tensors are warned of by name.
        allow_nonfinite: Write NaN and Inf of the source as they are, in tensors that are not quantized.
        overwrite: Replace ``out`` if it holds a model.
        revision: Branch, tag or commit of a Hub id.
        trust_remote_code: Run the model's own code, where transformers does not know its type.
        on_manifest: Called with the manifest before any work.
        on_block: Called with blocks calibrated and blocks in all.
        progress: Called with bytes written and bytes in all.

    Raises:
        FewbitsError: If the source cannot be read or is quantized already, a name or pattern is unknown, a weight
            holds NaN or Inf, or ``out`` is not free.
        OSError: If the output cannot be written. Nothing is left behind then.
        KeyboardInterrupt: What is done is kept, as after a kill: the same conversion, run again, goes on there.
    """
    out = Path(out)
    if layout == GGUF:
        if not isinstance(to, str):
            raise FewbitsError("to: a GGUF file has one type of matrices; give its name instead of a recipe")
        _refuse_for_gguf(to, keep, rotate, method or calibrate, overflow)
        opened = as_weights(open_source(source, revision=revision, trust_remote_code=trust_remote_code))
        return convert_to_gguf(opened, out, to, overwrite=overwrite, on_manifest=on_manifest, progress=progress)
    recipe = None if isinstance(to, str) else Recipe.of(to)
    name = str(to if recipe is None else recipe)
    precisions = (
        {name: replace(precision_named(name), rotated=rotate)} if recipe is None else recipe.precisions(rotated=rotate)
    )
    precision = next(iter(precisions.values()))
    if layout not in FOLDER_LAYOUTS:
        raise FewbitsError(f"layout {layout!r} is unknown; known: {', '.join([*FOLDER_LAYOUTS, GGUF])}")
    how = Method.named(method or ("absmax" if calibrate is None else "gptq"))
    _check_method(precision, how, calibrate)
    for each in precisions.values():
        _check_options(each, layout, keep, overflow)
    _check_rotation(name, precisions.values(), layout, rotate)
    opened = as_weights(open_source(source, revision=revision, trust_remote_code=trust_remote_code))
    if "quarot" in how.folds:
        opened = quarot(opened)
    dtype = TORCH_DTYPES[precision.name] if precision.cast else nominal_dtype(opened)
    model = empty_model(opened.config, dtype, auto_class_of(opened.config))
    shapes = {name: tensor.shape for name, tensor in opened.tensors.items()}
    as_rows = opened.weights if isinstance(opened, QuantizedSource) else {}
    places = check_tensors(model, shapes, opened.path, as_rows=as_rows)
    known = quantizable_weights(model)
    weights = {name: known[place.parameter] for name, place in places.items() if place.parameter in known}
    shapes |= {name: weights[name].rows(shape) for name, shape in as_rows.items() if name in weights}
    precisions = {key: fitted(model, each) for key, each in precisions.items()}
    precision = next(iter(precisions.values()))
    mixed = recipe.resolved([weight.module for weight in weights.values()], precisions) if recipe else None
    rounding = _rounding(opened, name, precisions.values(), layout)
    manifest = make_manifest(model, shapes, places, precision, dtype=dtype, keep=keep, mixed=mixed)
    if isinstance(opened, FoldedSource):
        manifest = [_told(row, opened.folds.reasons) for row in manifest]
    tokenizer = opened.tokenizer() if _has_tokenizer(opened) else None
    nbytes = sum(row.nbytes for row in manifest)
    layout_module = FOLDER_LAYOUTS[layout]
    calibration = None
    if how.codes == "gptq":
        if tokenizer is None:
            raise FewbitsError(f"method='gptq': {opened.path} has no tokenizer to read text with; use 'mse'")
        manifest.sort(key=lambda row: dot_natural_key(row.tensor))  # block after block
        quantized = {row.tensor: weights[row.tensor] for row in manifest if row.reason is None}
        become = {key: (mixed or {}).get(weight.module, precision) for key, weight in quantized.items()}
        windows = calibration_windows(tokenizer, None if calibrate is None else Path(calibrate), _context(opened))
        calibration = Calibration(
            opened, model, places, quantized, become, layout_module.SCALES or dtype, windows, on_block
        )
    job = FolderJob(
        opened, layout_module, precision, dtype, manifest, places, weights, overflow, allow_nonfinite, how.codes,
        calibration, mixed,
    )  # fmt: skip
    work = fingerprint(
        opened, to=recipe or to, layout=layout, keep=[*keep], rotate=rotate, method=how.name,
        calibrate=None if calibrate is None else read_text(Path(calibrate)),
        overflow=overflow, nonfinite=allow_nonfinite,
    )  # fmt: skip
    with staged_folder(out, overwrite=overwrite, nbytes=nbytes, fingerprint=work) as folder:
        if on_manifest is not None:
            on_manifest(manifest)
        job.write_config(model, folder)
        casts = job.write_tensors(folder / "model.safetensors", progress)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        asked = to if recipe is None else dict(recipe.rules)
        mark = {"fewbits": version("fewbits"), "source": opened.path.name, "to": asked, "layout": layout}
        mark |= {"method": how.name} if not precision.cast else {}
        lists = {"manifest": [asdict(row) for row in manifest], "casts": [asdict(cast) for cast in casts]}
        (folder / MARK).write_text(json.dumps({**mark, "nbytes": nbytes, **lists}, indent=1) + "\n")
    _warn_of_overflow(casts, precision, overflow)
    return Conversion(out, name, nbytes, tuple(manifest), tuple(casts), rounding)


def _refuse_for_gguf(to: str, keep: Sequence[str], rotate: bool, method: object, overflow: str | None) -> None:
    gguf_type(to)
    if method is not None:
        raise FewbitsError("method: GGUF types have one way to find their codes; leave --method and --calibrate out")
    if rotate:
        raise FewbitsError("rotate: the layout gguf cannot say it; leave --rotate or --layout out")
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


def _check_method(precision: Precision, method: Method, calibrate: object) -> None:
    if precision.cast and method != Method():
        raise FewbitsError(f"method={method.name!r}: a cast to {precision.name} has no scales to find; leave it out")
    if calibrate is not None and not method.reads_text:
        raise FewbitsError(f"calibrate: {method.name} reads no text, gptq does; leave --calibrate or --method out")


def _told(row: ManifestRow, reasons: Mapping[str, str]) -> ManifestRow:
    return replace(row, reason="; ".join(filter(None, (row.reason, reasons.get(row.tensor)))) or None)


def _context(source: Source) -> int:
    """The tokens that a model can read at once."""
    return int(getattr(source.config, "max_position_embeddings", None) or WINDOW_TOKENS)


def _check_rotation(name: str, precisions: Iterable[Precision], layout: str, rotate: bool) -> None:
    if not rotate:
        return
    if layout != compressed_tensors.NAME:
        raise FewbitsError(f"rotate: the layout {layout} cannot say it; leave --rotate or --layout out")
    if not any(precision.gains_by_rotation for precision in precisions):
        raise FewbitsError(
            f"rotate: {name} gains nothing by it, only what has 8-bit integer activations does; leave it out"
        )


def _rounding(source: Source, name: str, precisions: Collection[Precision], layout: str) -> str | None:
    if not isinstance(source, QuantizedSource):
        return None
    stored = {*source.precisions.values()}
    if source.layout == layout and {each.name for each in stored} == {each.name for each in precisions}:
        raise FewbitsError(f"{source.path} is {source.precision_name} already; convert the model that it was made from")
    taken_over = all(mine.stores_as(other) for mine in stored for other in precisions)
    return told_rounding(source, name, taken_over=taken_over)


def _has_tokenizer(source: Source) -> bool:
    """Whether a tokenizer comes with a model: always in GGUF, in a folder if there is any of its files."""
    names = ("tokenizer*", "vocab*", "*.model", "spiece*")
    return source.path.is_file() or any(any(source.path.glob(name)) for name in names)


def _warn_of_overflow(casts: Sequence[CastReport], precision: Precision, overflow: str | None) -> None:
    beyond = {cast.tensor: cast.overflowed for cast in casts if cast.overflowed}
    if not beyond:
        return
    became = {"ieee": "Inf", "saturate": "its largest number"}[precision.weights.overflow_rule(overflow)]
    wider = {"fp16": "use bf16 or fp32", "bf16": "use fp32"}.get(precision.name, "use a wider format")
    names = ", ".join(f"{name} ({count:,})" for name, count in beyond.items())
    warnings.warn(
        f"{sum(beyond.values()):,} values are beyond {precision.name}, whose largest number is "
        f"{float(precision.weights.max):.6g}, and became {became}: the model may not work; {wider}"
        f"{', or overflow saturate' if became == 'Inf' else ''}. They are in {names}",
        OverflowWarning,
        stacklevel=3,
    )
