"""Convert a model to a folder: what it becomes is checked, then written tensor by tensor."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path

from transformers.core_model_loading import dot_natural_key

from fewbits.errors import FewbitsError, OverflowWarning
from fewbits.models.filling import Progress
from fewbits.models.layouts import compressed_tensors
from fewbits.models.manifest import ManifestRow, fitted
from fewbits.models.precision import TORCH_DTYPES, Precision, precision_named
from fewbits.models.quantized_source import FOLDER_LAYOUTS, QuantizedSource
from fewbits.models.resumable import fingerprint
from fewbits.models.source import Source
from fewbits.models.staging import MARK, staged_folder
from fewbits.models.stored_dtype import nominal_dtype
from fewbits.models.text import read_text
from fewbits.quantize.calibrate import WINDOW_TOKENS, Calibration, calibration_windows
from fewbits.quantize.candidates import Candidates
from fewbits.quantize.contract import allowed_precisions
from fewbits.quantize.conversion import Conversion, told_rounding
from fewbits.quantize.folder_job import FolderJob
from fewbits.quantize.folding import FoldedSource
from fewbits.quantize.method import Method
from fewbits.quantize.prepared import Prepared
from fewbits.quantize.recipe import Recipe
from fewbits.tensors.cast_report import CastReport


@dataclass(frozen=True)
class FolderConversion:
    """How a model is converted, whatever it becomes; see ``convert``.

    Attributes:
        layout: ``compressed-tensors`` or ``bitsandbytes``.
        method: How codes and scales are found.
        keep: Patterns of module names that are not quantized.
        rotate: Whether weights are rotated first.
        calibrate: The text that is calibrated on; None: the built-in one.
        overflow: What a cast does with values beyond the new format.
        allow_nonfinite: Whether NaN and Inf are written as they are.
    """

    layout: str
    method: Method
    keep: Sequence[str]
    rotate: bool
    calibrate: Path | None
    overflow: str | None
    allow_nonfinite: bool

    def precisions(self, to: str | Recipe) -> dict[str, Precision]:
        """The precisions that a model gets, by name, groups not fitted yet.

        Raises:
            FewbitsError: If one is unknown, or something else that is asked for does not go with it.
        """
        if self.layout not in FOLDER_LAYOUTS:
            raise FewbitsError(f"layout {self.layout!r} is unknown; known: {', '.join([*FOLDER_LAYOUTS, 'gguf'])}")
        if isinstance(to, str):
            found = {to: replace(precision_named(to), rotated=self.rotate)}
        else:
            found = to.precisions(rotated=self.rotate)
        for each in found.values():
            _check_method(each, self.method, self.calibrate)
            _check_options(each, self.layout, self.keep, self.overflow)
        _check_rotation(str(to), found.values(), self.layout, self.rotate, self.method)
        return found

    def allowed(self, to: str | Mapping[str, str] | Recipe | None) -> list[Precision]:
        """The precisions that a search chooses from, groups not fitted.

        Raises:
            FewbitsError: If one is unknown, or something else that is asked for does not go with it.
        """
        if to is not None and not isinstance(to, str):
            raise FewbitsError("to: a contract searches the precisions of layers itself; give names, such as int8,int4")
        found = allowed_precisions(to, FOLDER_LAYOUTS[self.layout].WRITES)
        for each in found:
            _check_options(each, self.layout, self.keep, self.overflow)
        _check_rotation(", ".join(each.name for each in found), found, self.layout, self.rotate, self.method)
        return found

    def write(
        self,
        source: Source,
        out: Path,
        to: str | Recipe,
        *,
        overwrite: bool,
        candidates: Candidates | None = None,
        on_manifest: Callable[[Sequence[ManifestRow]], None] | None = None,
        on_block: Callable[[int, int], None] | None = None,
        progress: Progress | None = None,
    ) -> Conversion:
        """Write a model, from a source in which everything is folded.

        Args:
            source: The model.
            out: The folder.
            to: What it becomes.
            overwrite: Replace ``out`` if it holds a model.
            candidates: What gives quantized weights, made before; None: they are made here.
            on_manifest: Called with the manifest before any work.
            on_block: Called with blocks calibrated and blocks in all.
            progress: Called with bytes written and bytes in all.
        """
        precisions = self.precisions(to)
        precision = next(iter(precisions.values()))
        dtype = TORCH_DTYPES[precision.name] if precision.cast else nominal_dtype(source)
        prepared = Prepared.of(source, dtype)
        precisions = {key: fitted(prepared.model, each) for key, each in precisions.items()}
        precision, mixed = next(iter(precisions.values())), None
        if not isinstance(to, str):
            mixed = to.resolved([weight.module for weight in prepared.weights.values()], precisions)
        rounding = _rounding(source, str(to), precisions.values(), self.layout)
        manifest = prepared.manifest(precision, self.keep, mixed)
        if isinstance(source, FoldedSource):
            manifest = [_told(row, source.reasons) for row in manifest]
        tokenizer = source.tokenizer() if has_tokenizer(source) else None
        nbytes = sum(row.nbytes for row in manifest)
        calibration = None
        if self.method.codes == "gptq":
            manifest.sort(key=lambda row: dot_natural_key(row.tensor))  # block after block
            if candidates is None:
                calibration = self._calibration(prepared, manifest, precision, mixed, on_block)
        job = FolderJob(
            source, FOLDER_LAYOUTS[self.layout], precision, dtype, manifest, prepared.places, prepared.weights,
            self.overflow, self.allow_nonfinite, self.method.codes, calibration, mixed, candidates,
        )  # fmt: skip
        work = fingerprint(source, to=to, **self.settings())
        with staged_folder(out, overwrite=overwrite, nbytes=nbytes, fingerprint=work) as folder:
            if on_manifest is not None:
                on_manifest(manifest)
            job.write_config(prepared.model, folder)
            casts = job.write_tensors(folder / "model.safetensors", progress)
            if tokenizer is not None:
                tokenizer.save_pretrained(folder)
            asked = to if isinstance(to, str) else dict(to.rules)
            mark = {"fewbits": version("fewbits"), "source": source.path.name, "to": asked, "layout": self.layout}
            mark |= {"method": self.method.name} if not precision.cast else {}
            lists = {"manifest": [asdict(row) for row in manifest], "casts": [asdict(cast) for cast in casts]}
            (folder / MARK).write_text(json.dumps({**mark, "nbytes": nbytes, **lists}, indent=1) + "\n")
        _warn_of_overflow(casts, precision, self.overflow)
        return Conversion(out, str(to), nbytes, tuple(manifest), tuple(casts), rounding)

    def settings(self) -> dict[str, object]:
        """What a result depends on beside the source and what it becomes."""
        return {
            "layout": self.layout, "keep": [*self.keep], "rotate": self.rotate, "method": self.method.name,
            "calibrate": None if self.calibrate is None else read_text(self.calibrate),
            "overflow": self.overflow, "nonfinite": self.allow_nonfinite,
        }  # fmt: skip

    def _calibration(
        self,
        prepared: Prepared,
        manifest: Sequence[ManifestRow],
        precision: Precision,
        mixed: Mapping[str, Precision] | None,
        on_block: Callable[[int, int], None] | None,
    ) -> Calibration:
        source = prepared.source
        if not has_tokenizer(source):
            raise FewbitsError(f"method='gptq': {source.path} has no tokenizer to read text with; use 'mse'")
        quantized = {row.tensor: prepared.weights[row.tensor] for row in manifest if row.reason is None}
        become = {name: (mixed or {}).get(weight.module, precision) for name, weight in quantized.items()}
        windows = calibration_windows(source.tokenizer(), self.calibrate, context_of(source))
        scales = FOLDER_LAYOUTS[self.layout].SCALES or prepared.dtype
        return Calibration(source, prepared.model, prepared.places, quantized, become, scales, windows, on_block)


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
    if "quarot" in method.folds and precision.name == "fp8":  # 0.058 nats instead of 0.029 on SmolLM2-135M
        raise FewbitsError(
            "method='quarot': fp8 loses by rotation, as its steps grow with the numbers; use smoothquant"
        )
    if calibrate is not None and not method.reads_text:
        raise FewbitsError(
            f"calibrate: {method.name} reads no text, gptq and smoothquant do; leave --calibrate or --method out"
        )


def _told(row: ManifestRow, reasons: Mapping[str, str]) -> ManifestRow:
    return replace(row, reason="; ".join(filter(None, (row.reason, reasons.get(row.tensor)))) or None)


def context_of(source: Source) -> int:
    """The tokens that a model can read at once."""
    return int(getattr(source.config, "max_position_embeddings", None) or WINDOW_TOKENS)


def _check_rotation(name: str, precisions: Iterable[Precision], layout: str, rotate: bool, method: Method) -> None:
    if not rotate:
        return
    if "quarot" in method.folds:  # int8 on SmolLM2-135M: 0.010 nats instead of 0.005
        raise FewbitsError("rotate: method quarot rotates already, and twice is worse; leave --rotate out")
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


def has_tokenizer(source: Source) -> bool:
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
