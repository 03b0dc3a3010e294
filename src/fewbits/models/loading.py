"""Build a model empty, then let transformers fill it tensor by tensor, in the precision asked for.

transformers builds, places and fills the model; fewbits gives it the tensors, quantized on the way or as they are
stored. The peak of memory is the loaded model plus its largest tensor. Quantized layers stay quantized.
"""

from __future__ import annotations

import copy
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from fnmatch import fnmatchcase
from typing import Any

import psutil
import torch
import transformers

from fewbits.errors import FewbitsError
from fewbits.models.allocation import tight_memory
from fewbits.models.architecture import empty_model
from fewbits.models.filling import Progress, plain_tensors, quantized_tensors
from fewbits.models.manifest import fitted, make_manifest
from fewbits.models.naming import check_tensors
from fewbits.models.offload import check_device_map, errors_of_offloading, with_tied
from fewbits.models.precision import TORCH_DTYPES, Precision
from fewbits.models.quantizable import experts_left_out, output_head, quantizable_weights
from fewbits.models.quantized_source import QuantizedSource
from fewbits.models.quantizer import FewbitsConfig, Plan
from fewbits.models.source import Source
from fewbits.models.stored_dtype import nominal_dtype, stored_dtype


class Loading:
    """One call of ``from_pretrained``: what is wanted, and the steps to it."""

    def __init__(
        self,
        theirs: Any,
        source: Source,
        config: transformers.PreTrainedConfig,
        asked: Precision | None,
        dtype: torch.dtype | None,
        keep: Sequence[str],
        rotate: bool,
        progress: Progress | None,
        key_mapping: Mapping[str, str] | None,
    ) -> None:
        if isinstance(keep, str):
            raise FewbitsError(f"keep: a list of patterns is needed, got the string {keep!r}; give keep=[{keep!r}]")
        self.source, self.config, self.keep, self.rotate, self.progress = source, config, keep, rotate, progress
        stored = source.precision if isinstance(source, QuantizedSource) else None
        if isinstance(source, QuantizedSource) and asked is not None and asked.name != source.precision_name:
            raise FewbitsError(
                f"{source.path} is stored in {source.precision_name} and cannot be loaded in {asked.name}; "
                "load the model it was converted from"
            )
        self.precision = _rotated(stored or asked, stored, rotate, source)
        self.quantized = self.precision is not None and not self.precision.cast
        if keep and (stored is not None or not self.quantized):
            raise FewbitsError(f"keep: {source.path} is not quantized here, so nothing can be kept; leave it out")
        if self.quantized:
            self.dtype = dtype or torch.float32
        else:
            asked_dtype = TORCH_DTYPES[asked.name] if asked else dtype
            self.dtype = asked_dtype or nominal_dtype(source)
        self.empty = empty_model(config, self.dtype, theirs)
        shapes = {name: tensor.shape for name, tensor in source.tensors.items()}
        strict = theirs is transformers.AutoModelForCausalLM
        as_rows = source.weights if isinstance(source, QuantizedSource) else ()
        self.places = check_tensors(
            self.empty, shapes, source.path, strict=strict, as_rows=as_rows, key_mapping=key_mapping
        )

    def run(self, model_args: tuple[Any, ...], kwargs: dict[str, Any]) -> transformers.PreTrainedModel:
        """Build and fill the model."""
        check_device_map(kwargs.get("device_map"))
        fits = kwargs.get("device_map") is None
        if self.precision is None or not self.quantized:
            if fits:
                sizes = (torch.Size(tensor.shape).numel() for tensor in self.source.tensors.values())
                _refuse_what_does_not_fit(self.source, sum(sizes) * self.dtype.itemsize)
            tensors = plain_tensors(self.source, self.places, self.dtype, self.progress)
        else:
            plan, nbytes = self._plan(self.precision)
            if fits:
                _refuse_what_does_not_fit(self.source, nbytes)
            tensors = quantized_tensors(self.source, self.empty, self.places, plan, self.progress)
            kwargs["quantization_config"] = FewbitsConfig(plan)
            kwargs.setdefault("offload_buffers", True)  # codes and scales are buffers
        if kwargs.get("offload_folder") is not None:
            tensors = with_tied(tensors, self.places, self.empty.all_tied_weights_keys)
        kwargs.setdefault("generation_config", self.source.generation_config())
        config = copy.deepcopy(self.config)
        if hasattr(config, "quantization_config"):
            del config.quantization_config
        with tight_memory(), errors_of_offloading(), quiet(self.progress is not None or not sys.stderr.isatty()):
            loaded = type(self.empty).from_pretrained(
                None, *model_args, config=config, state_dict=tensors, dtype=self.dtype, **kwargs
            )
        model = loaded[0] if isinstance(loaded, tuple) else loaded  # with output_loading_info=True
        model.config.name_or_path = model.name_or_path = str(self.source.path)
        self._warn_of_what_is_left_out()
        return loaded

    def _plan(self, precision: Precision) -> tuple[Plan, int]:
        """What is quantized, and the bytes of the model."""
        if isinstance(self.source, QuantizedSource):
            layers = quantizable_weights(self.empty)
            here = [name for name in self.source.weights if name in self.places]
            quantized = [name for name in here if self.places[name].parameter in layers]
            kept, nbytes = stored_dtype(self.source), self.source.size
        else:
            kept = nominal_dtype(self.source)
            precision = fitted(self.empty, precision)
            shapes = {name: tensor.shape for name, tensor in self.source.tensors.items()}
            manifest = make_manifest(self.empty, shapes, self.places, precision, dtype=kept, keep=self.keep)
            quantized = [row.tensor for row in manifest if row.reason is None]
            nbytes = sum(row.nbytes for row in manifest)
        parameters = {parameter for name in quantized for parameter in self.places[name].parameters()}
        head = output_head(self.empty)
        present = {place.parameter for place in self.places.values()}
        keeps_head = head is not None and any(fnmatchcase(head.removesuffix(".weight"), each) for each in self.keep)
        if head in present and head not in self.empty.all_tied_weights_keys and not keeps_head:
            parameters.add(head)
        scales = self.source.scale_dtype if isinstance(self.source, QuantizedSource) else kept
        mixed = self._mixed(quantized)
        return Plan(precision, frozenset(parameters), kept, self.dtype, scales, not keeps_head, mixed), nbytes

    def _mixed(self, quantized: Sequence[str]) -> dict[str, Precision]:
        """What each weight is, by parameter, of a checkpoint in which they differ; else nothing."""
        source = self.source
        mixed: dict[str, Precision] = {}
        of_module: dict[str, Precision] = {}
        if not isinstance(source, QuantizedSource) or len(set(source.precisions.values())) == 1:
            return {}
        layers = quantizable_weights(self.empty)
        for name in quantized:
            stored = source.precisions[name]
            precision = _rotated(stored, stored, self.rotate, source)
            assert precision is not None, name
            for parameter in self.places[name].parameters():
                module = layers[parameter].module  # experts have one precision: what differs is rounded again
                mixed[parameter] = of_module.setdefault(module, precision)
        return mixed

    def _warn_of_what_is_left_out(self) -> None:
        experts = experts_left_out(self.empty) if self.quantized else []
        if experts:
            kind = type(self.empty.get_submodule(experts[0])).__name__
            warnings.warn(
                f"{self.source.path}: experts of the kind {kind} are not quantized and stay in {self.dtype}: "
                f"{experts[0]} and {len(experts) - 1} more",
                stacklevel=4,
            )
        left_out = [name for name in self.source.tensors if name not in self.places]
        if left_out:
            warnings.warn(
                f"{self.source.path}: {len(left_out)} tensors have no place in {type(self.empty).__name__} and "
                f"were left out, such as {left_out[0]}",
                stacklevel=4,
            )


@contextmanager
def quiet(silent: bool) -> Iterator[None]:
    """Without transformers' progress bar, where the caller has one or there is no terminal to draw it on."""
    logging = transformers.utils.logging
    before = logging.is_progress_bar_enabled()
    if silent:
        logging.disable_progress_bar()
    try:
        yield
    finally:
        if before:
            logging.enable_progress_bar()


def _rotated(precision: Precision | None, stored: Precision | None, rotate: bool, source: Source) -> Precision | None:
    """The precision with rotation, where layers gain by it and their weights can still take it."""
    if precision is None or precision.rotated:
        if precision is not None and not rotate:
            raise FewbitsError(f"rotate=False: {source.path} is stored with rotated weights; load it without rotate")
        return precision
    fine_enough = stored is None or stored.weights.bits >= 8
    return replace(precision, rotated=rotate and precision.gains_by_rotation and fine_enough)


def _refuse_what_does_not_fit(source: Source, nbytes: int) -> None:
    free = psutil.virtual_memory().available
    if nbytes > free:
        raise FewbitsError(
            f"{source.path}: the weights take {nbytes / 2**30:.1f} GiB and {free / 2**30:.1f} GiB of memory are free; "
            "load it in fewer bits (precision='int8') or free some memory"
        )
