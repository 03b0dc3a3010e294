"""A model to be measured: live, or on disk and loaded when its turn comes."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

import torch
from torch import nn
from transformers import PreTrainedConfig

from fewbits.errors import FewbitsError
from fewbits.measure.memory import bits_per_weight, checkpoint_bytes, is_quantized

ModelOrPath = nn.Module | str | os.PathLike[str]
"""A live transformers model, or a folder, a `.gguf` file or a Hub id."""

_CASTS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Subject:
    """A model by the name it has in a table, not loaded yet if it is on disk."""

    name: str
    model: ModelOrPath
    config: Any = None
    """The model's configuration; None for a live one that has none."""
    stored: str | None = None
    """The precision that it is quantized in; None if its weights are plain values."""
    precision: str | None = None
    """What to load or cast it in; None: as it is."""
    source_bytes: int | None = None
    """Bytes of its weights on disk; None for a live model."""

    @classmethod
    def of(cls, model: ModelOrPath) -> Self:
        """Take a model as it is given; a path is opened (headers only), so that a wrong one is found early.

        Raises:
            FewbitsError: the path is no model that fewbits reads, the model writes no text, or the live model is in
                training mode.
        """
        if isinstance(model, nn.Module):
            if model.training:
                raise FewbitsError(
                    f"{type(model).__name__} is in training mode, with dropout on: call its eval() first"
                )
            stored = "quantized" if _is_quantized(model) else None
            return cls(type(model).__name__, model, getattr(model, "config", None), stored)
        from fewbits.models.generate import check_writes_text
        from fewbits.models.source import open_source
        from fewbits.models.stored_dtype import stored_name

        source = open_source(model)
        check_writes_text(source.config)
        given, precision = os.fspath(model), stored_name(source)
        name = Path(given).name if Path(given).exists() else given
        return cls(name, model, source.config, precision, None, source.size)

    def in_precision(self, precision: str) -> Self:
        """The same model in another precision: a cast, or for one on disk, quantized while it is loaded.

        Raises:
            FewbitsError: there is no such precision, the model is quantized already, or it is live and has to be
                quantized.
        """
        from fewbits.models.precision import precision_named

        cast = precision_named(precision).cast
        if self.stored is not None:
            raise FewbitsError(
                f"{self.name} is quantized ({self.stored}) and cannot be had in {precision}: give the model it was "
                "converted from"
            )
        if isinstance(self.model, nn.Module) and not cast:
            raise FewbitsError(
                f"{self.name} is a live model and cannot be quantized to {precision} here: save it, and give the folder"
            )
        return replace(self, precision=precision)

    def as_reference(self) -> tuple[Self, ...]:
        """The rows that it has as a reference: in fp32 and bf16; a quantized one as it is."""
        return (self,) if self.stored is not None else (self.in_precision("fp32"), self.in_precision("bf16"))

    @property
    def vocabulary(self) -> int | None:
        """How many tokens it gives a probability, where its configuration tells."""
        return getattr(_of_text(self.config), "vocab_size", None)

    @property
    def context(self) -> int | None:
        """Tokens that it reads at most, where its configuration tells."""
        from fewbits.models.generate import context_length

        return context_length(self.config) if isinstance(self.config, PreTrainedConfig) else None

    def tokenizer(self) -> Any:
        """The tokenizer beside the model on disk.

        Raises:
            FewbitsError: the model is live: it carries none.
        """
        if isinstance(self.model, nn.Module):
            raise FewbitsError(f"{self.name} is a live model and carries no tokenizer: give compare a tokenizer=")
        from fewbits.models.load import AutoTokenizer

        return AutoTokenizer.from_pretrained(self.model)

    def own_tokenizer(self) -> Any | None:
        """The tokenizer beside the model on disk; None where there is none."""
        try:
            return None if isinstance(self.model, nn.Module) else self.tokenizer()
        except (FewbitsError, OSError):
            return None

    @property
    def is_loaded_here(self) -> bool:
        """Whether `load` brings it into memory; a live model is there already, at least one copy of it."""
        return not isinstance(self.model, nn.Module)

    def load(self, device: str = "cpu", progress: Callable[[int, int], None] | None = None) -> nn.Module:
        """The model in memory. A live one is copied only if it has to be cast, and stays on its device.

        Args:
            device: where to load it: cpu or cuda.
            progress: called with bytes read and bytes in all.

        Raises:
            FewbitsError: it cannot be read or does not fit.
        """
        if isinstance(self.model, nn.Module):
            return self.model if self.precision is None else _cast(self.model, self.precision)
        from fewbits.models.load import AutoModelForCausalLM

        where: dict[str, Any] = {} if device == "cpu" else {"device_map": device}
        loaded: nn.Module = AutoModelForCausalLM.from_pretrained(
            self.model, precision=self.precision, progress=progress, **where
        )
        return loaded

    def disk_bytes(self, loaded: nn.Module) -> int | None:
        """Bytes of the weights on disk: of its own files, or of a checkpoint of the cast; None if it has neither."""
        if self.precision is None:
            return self.source_bytes
        return checkpoint_bytes(loaded) if self.precision in _CASTS else None

    def precision_name(self, loaded: nn.Module) -> str:
        """The precision to show: what was asked for, what the files say, or what the layers hold."""
        if self.precision is not None:
            return self.precision
        if self.stored is not None and not isinstance(self.model, nn.Module):
            return self.stored
        if any(is_quantized(module) for module in loaded.modules()):
            return f"{bits_per_weight(loaded):.1f} bits"
        if self.stored is not None:
            return self.stored
        dtype = next(loaded.parameters()).dtype
        return next((name for name, known in _CASTS.items() if known == dtype), str(dtype).removeprefix("torch."))


def _is_quantized(model: nn.Module) -> bool:
    """Whether a live model is quantized, by fewbits or by another library under transformers."""
    return bool(getattr(model, "is_quantized", False)) or any(is_quantized(module) for module in model.modules())


def _of_text(config: Any) -> Any:
    """The part of a configuration that describes the language model."""
    return config.get_text_config() if isinstance(config, PreTrainedConfig) else config


def _cast(model: nn.Module, precision: str) -> nn.Module:
    """The model with every stored floating-point tensor in a precision; itself if it is so already.

    Buffers that a checkpoint leaves out stay: a rotary embedding's frequencies in bf16 would be another model.
    """
    dtype = _CASTS[precision]
    if all(tensor.dtype == dtype for tensor in model.state_dict().values() if tensor.is_floating_point()):
        return model
    model = copy.deepcopy(model)
    for tensor in model.state_dict(keep_vars=True).values():
        if tensor.is_floating_point():
            tensor.data = tensor.data.to(dtype)
    return model
