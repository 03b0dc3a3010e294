"""Load a model: built empty, then filled tensor by tensor, in the precision asked for.

transformers builds, places and fills the model; fewbits gives it the tensors, quantized on the way or as they are
stored. The peak of memory is the loaded model plus its largest tensor. Quantized layers stay quantized.
"""

from __future__ import annotations

import copy
import os
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase
from typing import Any, ClassVar

import psutil
import torch
import transformers
from accelerate import init_empty_weights

from fewbits.errors import FewbitsError
from fewbits.models.allocation import tight_memory
from fewbits.models.filling import Progress as Progress
from fewbits.models.filling import plain_tensors, quantized_tensors
from fewbits.models.manifest import fitted, make_manifest
from fewbits.models.naming import check_tensors
from fewbits.models.offload import check_device_map, errors_of_offloading, with_tied
from fewbits.models.precision import TORCH_DTYPES, Precision, precision_named
from fewbits.models.quantizable import experts_left_out, output_head, quantizable_weights
from fewbits.models.quantized_source import QuantizedSource, as_weights
from fewbits.models.quantizer import FewbitsConfig, Plan
from fewbits.models.source import Source, open_source

_TASKS = (
    "ForCausalLM",
    "ForSeq2SeqLM",
    "",
    "ForSequenceClassification",
    "ForMaskedLM",
    "ForTokenClassification",
    "ForQuestionAnswering",
)
_OF_THE_HUB = ("cache_dir", "force_download", "local_files_only", "subfolder", "token")


class _AutoClass:
    """What the Auto classes have in common; each names the class of transformers that it stands for."""

    _theirs: ClassVar[Any]

    @classmethod
    def from_pretrained(
        cls,
        model: str | os.PathLike[str],
        *model_args: Any,
        precision: str | None = None,
        load_in_8bit: bool = False,
        load_in_4bit: bool = False,
        keep: Sequence[str] = (),
        dtype: torch.dtype | str | None = None,
        revision: str | None = None,
        trust_remote_code: bool = False,
        progress: Progress | None = None,
        **kwargs: Any,
    ) -> transformers.PreTrainedModel:
        """Load a model for inference.

        Args:
            model: Hub id, folder (also one that ``fewbits.convert`` wrote), or ``.gguf`` file.
            model_args: For the model's constructor.
            precision: ``fp32``, ``bf16``, ``fp16``, ``int8``, ``int8-weight``, ``int4``, ``nf4`` or ``fp8``; None: as
                it is stored (block-quantized GGUF types are loaded in the model's 16-bit dtype).
            load_in_8bit: The same as ``precision="int8"``.
            load_in_4bit: The same as ``precision="int4"``.
            keep: Patterns of module names that are not quantized (``*`` matches anything).
            dtype: What is computed in between quantized layers; None: float32. With a cast precision it is the cast's.
            revision: Branch, tag or commit of a Hub id.
            trust_remote_code: Run the model's own code, where transformers does not know its type. Never needed, and
                never done, for families that fewbits has an adapter for.
            progress: Called with bytes read and bytes in all.
            kwargs: Everything else is transformers' own: ``device_map``, ``attn_implementation``, ``max_memory``,
                ``offload_folder``, fields of the configuration, …

        Returns:
            The transformers model, in eval mode. Quantized linear layers are ``QuantLinear``; the output head is among
            them (in int8), while the embedding stays in 16 bits.

        Raises:
            FewbitsError: If the model cannot be found, read or held in memory, or the precision is unknown or is not
                the one that the checkpoint is stored in.
        """
        wanted = _asked_precision(precision, load_in_8bit, load_in_4bit)
        if kwargs.get("quantization_config") is not None:
            raise FewbitsError(
                "quantization_config: transformers' own quantizers are not used here; give precision=, or load with "
                "transformers"
            )
        dtype = _dtype_named(kwargs.pop("torch_dtype", None) if dtype is None else dtype)
        hub = {name: kwargs.pop(name) for name in _OF_THE_HUB if name in kwargs}
        source = as_weights(open_source(model, revision=revision, trust_remote_code=trust_remote_code, **hub))
        config = _configuration(source, kwargs)
        theirs = transformers.AutoModelForCausalLM if _has_head(source, cls._theirs) else cls._theirs
        return _Loading(theirs, source, config, wanted, dtype, keep, progress, kwargs.get("key_mapping")).run(
            model_args, kwargs
        )


class AutoModel(_AutoClass):
    """A model without a head for a task; ChatGLM comes with its language head, as in its own code."""

    _theirs = transformers.AutoModel


class AutoModelForCausalLM(_AutoClass):
    """A language model with its head, from a Hub id, a folder or a ``.gguf`` file."""

    _theirs = transformers.AutoModelForCausalLM


class AutoModelForSeq2SeqLM(_AutoClass):
    """A model that reads one text and writes another, such as T5."""

    _theirs = transformers.AutoModelForSeq2SeqLM


class AutoModelForSequenceClassification(_AutoClass):
    """A model that classifies texts; a head that the checkpoint does not have is made anew, in float."""

    _theirs = transformers.AutoModelForSequenceClassification


class AutoTokenizer:
    """A model's tokenizer, from a Hub id, a folder or a ``.gguf`` file."""

    @classmethod
    def from_pretrained(
        cls, model: str | os.PathLike[str], *, revision: str | None = None, trust_remote_code: bool = False
    ) -> transformers.PreTrainedTokenizerBase:
        """Load the tokenizer with its special tokens and chat template.

        Args:
            model: Hub id, folder or ``.gguf`` file.
            revision: Branch, tag or commit of a Hub id.
            trust_remote_code: Run the tokenizer's own code, where transformers does not know it.

        Raises:
            FewbitsError: If the model cannot be found or has no tokenizer.
        """
        return open_source(model, revision=revision, trust_remote_code=trust_remote_code).tokenizer()


class _Loading:
    """One call of ``from_pretrained``: what is wanted, and the steps to it."""

    def __init__(
        self,
        theirs: Any,
        source: Source,
        config: transformers.PreTrainedConfig,
        asked: Precision | None,
        dtype: torch.dtype | None,
        keep: Sequence[str],
        progress: Progress | None,
        key_mapping: Mapping[str, str] | None,
    ) -> None:
        if isinstance(keep, str):
            raise FewbitsError(f"keep: a list of patterns is needed, got the string {keep!r}; give keep=[{keep!r}]")
        self.source, self.config, self.keep, self.progress = source, config, keep, progress
        stored = stored_precision(source)
        if stored is not None and asked is not None and asked.name != stored.name:
            raise FewbitsError(
                f"{source.path} is stored in {stored.name} and cannot be loaded in {asked.name}; "
                "load the model it was converted from"
            )
        self.precision = stored or asked
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
        with tight_memory(), errors_of_offloading(), _quiet(self.progress is not None or not sys.stderr.isatty()):
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
        return Plan(precision, frozenset(parameters), kept, self.dtype, scales, not keeps_head), nbytes

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


def empty_model(
    config: transformers.PreTrainedConfig, dtype: torch.dtype, auto_class: Any = transformers.AutoModelForCausalLM
) -> transformers.PreTrainedModel:
    """Build a model with parameters of ``dtype`` that take no memory (buffers do).

    Args:
        config: Its configuration.
        dtype: Of its parameters.
        auto_class: The class of transformers that knows which model is meant.

    Raises:
        FewbitsError: If the configuration is not one of such a model that transformers knows and can build.
    """
    name = config.name_or_path or config.model_type
    remote = auto_class.__name__ in (getattr(config, "auto_map", None) or {})
    if type(config) not in auto_class._model_mapping and not remote:
        kind = "causal language model" if auto_class is transformers.AutoModelForCausalLM else auto_class.__name__
        raise FewbitsError(
            f"{name}: transformers has no {kind} of type {config.model_type!r}; "
            f"{'give a model that writes text, or use AutoModel' if 'causal' in kind else 'use another Auto class'}"
        )
    try:
        with init_empty_weights(include_buffers=False):
            return auto_class.from_config(copy.deepcopy(config), dtype=dtype, trust_remote_code=remote)
    except Exception as error:  # transformers checks sizes with whatever exception comes
        message = " ".join(str(error).split())
        raise FewbitsError(f"{name}: transformers cannot build the model: {message}; repair config.json") from error


def auto_class_of(config: transformers.PreTrainedConfig) -> Any:
    """The Auto class whose model for this configuration is the architecture that it names, a causal one if none is."""
    names = config.architectures or []
    classes = [getattr(transformers, f"AutoModel{task}") for task in _TASKS]
    known = [each for each in classes if type(config) in each._model_mapping]
    for each in known:
        models = each._model_mapping[type(config)]
        if any(model.__name__ in names for model in (models if isinstance(models, (list, tuple)) else [models])):
            return each
    return known[0] if known else transformers.AutoModelForCausalLM


def stored_precision(source: Source) -> Precision | None:
    """The precision that a source is quantized in, or None if its tensors are plain values."""
    weights = as_weights(source) if not isinstance(source, QuantizedSource) else source
    return weights.precision if isinstance(weights, QuantizedSource) else None


def nominal_dtype(source: Source) -> torch.dtype:
    """The dtype of what is not quantized: the model's own, or bfloat16 if it names none of 16 or 32 bits."""
    dtype = source.config.dtype
    return dtype if dtype in TORCH_DTYPES.values() else torch.bfloat16


def stored_dtype(source: Source) -> torch.dtype:
    """The dtype in which a quantized checkpoint stores what is not quantized: its widest float."""
    dtypes = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
    found = {dtypes[tensor.stored_as] for tensor in source.tensors.values() if tensor.stored_as in dtypes}
    return torch.float32 if len(found) > 1 else found.pop() if found else nominal_dtype(source)


def _asked_precision(precision: str | None, load_in_8bit: bool, load_in_4bit: bool) -> Precision | None:
    if load_in_8bit and load_in_4bit:
        raise FewbitsError("load_in_8bit=True and load_in_4bit=True exclude each other; give one of them")
    for asked, keyword, means in ((load_in_8bit, "load_in_8bit", "int8"), (load_in_4bit, "load_in_4bit", "int4")):
        if asked and precision not in (None, means):
            raise FewbitsError(f"{keyword}=True is precision={means!r}, but precision={precision!r}; give one of them")
        if asked:
            return precision_named(means)
    return None if precision is None else precision_named(precision)


def _dtype_named(dtype: torch.dtype | str | None) -> torch.dtype | None:
    if dtype is None or dtype == "auto":
        return None
    named = getattr(torch, dtype.removeprefix("torch."), None) if isinstance(dtype, str) else dtype
    if named not in TORCH_DTYPES.values():
        raise FewbitsError(f"dtype {dtype!r} is none that a model computes in; give float32, bfloat16 or float16")
    return named


def _configuration(source: Source, kwargs: dict[str, Any]) -> transformers.PreTrainedConfig:
    """The model's configuration, with the fields that the caller sets; they are taken out of ``kwargs``."""
    given = kwargs.pop("config", None)
    config = copy.deepcopy(source.config if given is None else given)
    for name in [name for name in kwargs if hasattr(config, name)]:
        setattr(config, name, kwargs.pop(name))
    return config


def _has_head(source: Source, theirs: Any) -> bool:
    """Whether ``AutoModel`` means the model with its language head: so for families whose own code says so."""
    return theirs is transformers.AutoModel and getattr(source, "auto_model_has_head", False)


@contextmanager
def _quiet(silent: bool) -> Iterator[None]:
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


def _refuse_what_does_not_fit(source: Source, nbytes: int) -> None:
    free = psutil.virtual_memory().available
    if nbytes > free:
        raise FewbitsError(
            f"{source.path}: the weights take {nbytes / 2**30:.1f} GiB and {free / 2**30:.1f} GiB of memory are free; "
            "load it in fewer bits (precision='int8') or free some memory"
        )
