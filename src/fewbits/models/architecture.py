"""Models that take no memory yet, built by transformers from a configuration."""

from __future__ import annotations

import copy
from typing import Any

import torch
import transformers
from accelerate import init_empty_weights

from fewbits.errors import FewbitsError

_TASKS = (
    "ForCausalLM",
    "ForSeq2SeqLM",
    "",
    "ForSequenceClassification",
    "ForMaskedLM",
    "ForTokenClassification",
    "ForQuestionAnswering",
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
