"""Load a model: built empty, then filled tensor by tensor, in the precision asked for.

The peak of memory is the loaded model plus its largest tensor. Quantized layers stay quantized.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator

import psutil
import torch
import transformers
from accelerate import init_empty_weights
from torch import Tensor, nn

from fewbits.errors import FewbitsError
from fewbits.models.fill import Filler, check_tensors
from fewbits.models.layouts import compressed_tensors
from fewbits.models.layouts.compressed_tensors import is_scale, scale_name
from fewbits.models.linear import keep_compute_dtype
from fewbits.models.manifest import make_manifest
from fewbits.models.precision import TORCH_DTYPES, Precision, cast_weight, precision_named
from fewbits.models.source import Source, open_source
from fewbits.tensors.quantized import QuantizedTensor

Progress = Callable[[int, int], None]
"""Called with bytes done and bytes in all."""


class AutoModelForCausalLM:
    """A language model with its head, from a Hub id, a folder or a ``.gguf`` file."""

    @classmethod
    def from_pretrained(
        cls,
        model: str | os.PathLike[str],
        *,
        precision: str | None = None,
        load_in_8bit: bool = False,
        dtype: torch.dtype | None = None,
        revision: str | None = None,
        progress: Progress | None = None,
    ) -> transformers.PreTrainedModel:
        """Load a model for inference on the CPU.

        Args:
            model: Hub id, folder (also one that ``fewbits.convert`` wrote), or ``.gguf`` file.
            precision: ``fp32``, ``bf16``, ``fp16`` or ``int8``; None: as it is stored (block-quantized GGUF types are
                loaded in the model's 16-bit dtype).
            load_in_8bit: The same as ``precision="int8"``.
            dtype: What is computed in between quantized layers; None: float32. With a cast precision it is the cast's.
            revision: Branch, tag or commit of a Hub id.
            progress: Called with bytes read and bytes in all.

        Returns:
            The transformers model, in eval mode. Linear layers in int8 are ``QuantLinear``; the output head is among
            them, while the embedding stays in 16 bits.

        Raises:
            FewbitsError: If the model cannot be found, read or held in memory, or the precision is unknown or is not
                the one that the checkpoint is stored in.
        """
        if load_in_8bit:
            if precision not in (None, "int8"):
                raise FewbitsError(
                    f"load_in_8bit=True is precision='int8', but precision={precision!r}; give one of them"
                )
            precision = "int8"
        source = open_source(model, revision=revision)
        wanted = _precision_of(source, precision)
        if wanted is None or wanted.cast:
            return _load_cast(source, wanted, dtype, progress)
        return _load_quantized(source, wanted, dtype or torch.float32, progress)


class AutoTokenizer:
    """A model's tokenizer, from a Hub id, a folder or a ``.gguf`` file."""

    @classmethod
    def from_pretrained(
        cls, model: str | os.PathLike[str], *, revision: str | None = None
    ) -> transformers.PreTrainedTokenizerBase:
        """Load the tokenizer with its special tokens and chat template.

        Raises:
            FewbitsError: If the model cannot be found or has no tokenizer.
        """
        return open_source(model, revision=revision).tokenizer()


def empty_model(config: transformers.PreTrainedConfig, dtype: torch.dtype) -> transformers.PreTrainedModel:
    """Build a causal language model with parameters of ``dtype`` that take no memory (buffers do).

    Raises:
        FewbitsError: If the configuration is not one of a causal language model that transformers knows and can build.
    """
    name = config.name_or_path or config.model_type
    if type(config) not in transformers.MODEL_FOR_CAUSAL_LM_MAPPING:
        raise FewbitsError(
            f"{name}: transformers has no causal language model of type {config.model_type!r}; give a model that "
            "writes text"
        )
    try:
        with init_empty_weights(include_buffers=False):
            return transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
    except Exception as error:  # transformers checks sizes with whatever exception comes
        message = " ".join(str(error).split())
        raise FewbitsError(f"{name}: transformers cannot build the model: {message}; repair config.json") from error


def stored_precision(source: Source) -> Precision | None:
    """The precision that a source is quantized in, or None if its tensors are plain values."""
    config = getattr(source.config, "quantization_config", None)
    if config is None:
        return None
    return compressed_tensors.stored_precision(dict(config), source.path)


def nominal_dtype(source: Source) -> torch.dtype:
    """The dtype of what is not quantized: the model's own, or bfloat16 if it names none of 16 or 32 bits."""
    dtype = source.config.dtype
    return dtype if dtype in TORCH_DTYPES.values() else torch.bfloat16


def _precision_of(source: Source, asked: str | None) -> Precision | None:
    wanted = None if asked is None else precision_named(asked)
    stored = stored_precision(source)
    if stored is not None and wanted is not None and wanted != stored:
        raise FewbitsError(
            f"{source.path} is stored in {stored.name} and cannot be loaded in {wanted.name}; "
            "load the model it was converted from"
        )
    return stored or wanted


def _load_cast(
    source: Source, wanted: Precision | None, dtype: torch.dtype | None, progress: Progress | None
) -> transformers.PreTrainedModel:
    if wanted is not None:
        dtype = TORCH_DTYPES[wanted.name]
    dtype = dtype or nominal_dtype(source)
    _refuse_what_does_not_fit(
        source, sum(torch.Size(t.shape).numel() for t in source.tensors.values()) * dtype.itemsize
    )
    model = empty_model(source.config, dtype)
    check_tensors(model, {name: tensor.shape for name, tensor in source.tensors.items()}, source.path)
    filler = Filler(model, source)
    for name, tensor in _stream(source, progress):
        filler.fill(name, cast_weight(name, tensor, dtype))
    model.tie_weights()
    return filler.finish()


def _load_quantized(
    source: Source, precision: Precision, dtype: torch.dtype, progress: Progress | None
) -> transformers.PreTrainedModel:
    """Fill a model with quantized layers; those that are stored as plain values are quantized on the way.

    What is not quantized is rounded to the model's nominal dtype, as in a converted folder: both give the same model.
    """
    kept = nominal_dtype(source)
    model = empty_model(source.config, dtype)
    shapes = {name: tensor.shape for name, tensor in source.tensors.items() if not is_scale(name, source.tensors)}
    check_tensors(model, shapes, source.path)
    if stored_precision(source) is None:
        manifest = make_manifest(model, shapes, precision, dtype=kept)
        quantized = {row.tensor for row in manifest if row.reason is None}
        _refuse_what_does_not_fit(source, sum(row.nbytes for row in manifest))
    else:
        compressed_tensors.check_scales(source.tensors, source.path)
        quantized = {name for name in shapes if scale_name(name) in source.tensors}
        _refuse_what_does_not_fit(source, source.size)

    embedding = _weight_name(model, model.get_input_embeddings())
    head = _weight_name(model, model.get_output_embeddings())
    filler = Filler(model, source)
    for name, tensor in _stream(source, progress):
        if name == embedding:
            # The table stays in 16 bits. A tied head has the same numbers, but a decode step reads all of it.
            table = cast_weight(name, tensor, kept)
            filler.fill(name, table)
            keep_compute_dtype(model.get_input_embeddings(), dtype)
            if head is not None and head not in source.tensors:  # tied
                filler.quantize(head, table, kept)
        elif scale_name(name) in source.tensors:
            filler.place(name, QuantizedTensor(tensor, source.read(scale_name(name))))
        elif name in quantized or name == head:
            filler.quantize(name, cast_weight(name, tensor, kept) if name == head else tensor, kept)
        elif not is_scale(name, source.tensors):
            filler.fill(name, cast_weight(name, tensor, kept).to(dtype))
    return filler.finish()


def _weight_name(model: nn.Module, module: nn.Module | None) -> str | None:
    return next((f"{name}.weight" for name, known in model.named_modules() if known is module), None)


def _stream(source: Source, progress: Progress | None) -> Iterator[tuple[str, Tensor]]:
    done, total = 0, sum(tensor.nbytes for tensor in source.tensors.values())
    for name, tensor in source.tensors.items():
        yield name, source.read(name)
        done += tensor.nbytes
        if progress is not None:
            progress(done, total)


def _refuse_what_does_not_fit(source: Source, nbytes: int) -> None:
    free = psutil.virtual_memory().available
    if nbytes > free:
        raise FewbitsError(
            f"{source.path}: the weights take {nbytes / 2**30:.1f} GiB and {free / 2**30:.1f} GiB of memory are free; "
            "load it in fewer bits (precision='int8') or free some memory"
        )
