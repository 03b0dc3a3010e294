"""The Auto classes: ``from_pretrained`` as transformers has it, with a precision."""

from __future__ import annotations

import copy
import os
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
import transformers

from fewbits.errors import FewbitsError
from fewbits.models.attention import use_attention
from fewbits.models.filling import Progress
from fewbits.models.int8_cache import check_kv_cache, use_int8_cache
from fewbits.models.loading import Loading
from fewbits.models.outliers import keep_outliers_apart
from fewbits.models.precision import TORCH_DTYPES, Precision, precision_named
from fewbits.models.quantized_source import as_weights
from fewbits.models.source import Source, open_source

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
        rotate: bool = True,
        llm_int8_threshold: float | None = None,
        dtype: torch.dtype | str | None = None,
        kv_cache: str | None = None,
        revision: str | None = None,
        trust_remote_code: bool = False,
        progress: Progress | None = None,
        **kwargs: Any,
    ) -> transformers.PreTrainedModel:
        """Load a model for inference.

        Args:
            model: Hub id, folder (also one that ``fewbits.convert`` wrote), or ``.gguf`` file.
            model_args: For the model's constructor.
            precision: ``fp32``, ``bf16``, ``fp16``, ``int8``, ``int8-weight``, ``int4``, ``nf4``, ``mxfp4`` or ``fp8``;
                None: as it is stored (block-quantized GGUF types are loaded in the model's 16-bit dtype).
            load_in_8bit: The same as ``precision="int8"``.
            load_in_4bit: The same as ``precision="int4"``.
            keep: Patterns of module names that are not quantized (``*`` matches anything).
            rotate: Let layers with 8-bit activations rotate them, and their weights, which spreads outliers: several
                times as accurate, at about 3 % of the speed.
            llm_int8_threshold: Instead of rotating, int8 layers multiply activations from this magnitude on in float
                (LLM.int8(); 6.0 is usual). Slower, and less accurate than rotating; None: they do not.
            dtype: What is computed in between quantized layers; None: float32. With a cast precision it is the cast's.
            kv_cache: ``int8``: keys and values are kept in int8 with a scale for each head and token, in a quarter of
                float32's memory; None: as they are computed.
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
            FewbitsError: If the model cannot be found, read or held in memory, the precision is unknown or is not the
                one that the checkpoint is stored in, or the model has no cache that could be of ``kv_cache``.
        """
        check_kv_cache(kv_cache)
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
        rotate = rotate and llm_int8_threshold is None
        own_attention = kwargs.get("attn_implementation") is not None
        loading = Loading(theirs, source, config, wanted, dtype, keep, rotate, progress, kwargs.get("key_mapping"))
        loaded = loading.run(model_args, kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        if loading.quantized and not own_attention:
            use_attention(model)
        if llm_int8_threshold is not None:
            keep_outliers_apart(model, llm_int8_threshold)
        if kv_cache is not None:
            use_int8_cache(model)
        return loaded


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
