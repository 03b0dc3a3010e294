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
    precision: str | None = None
    """What to load or cast it in; None: as it is."""
    source_bytes: int | None = None
    """Bytes of its weights on disk; None for a live model."""

    @classmethod
    def of(cls, model: ModelOrPath) -> Self:
        """Take a model as it is given; a path is opened (headers only), so that a wrong one is found early.

        Raises:
            FewbitsError: the path is no model that fewbits reads, or the live model is in training mode.
        """
        if isinstance(model, nn.Module):
            if model.training:
                raise FewbitsError(
                    f"{type(model).__name__} is in training mode, with dropout on: call its eval() first"
                )
            return cls(type(model).__name__, model)
        from fewbits.models.source import open_source

        source = open_source(model)
        given = os.fspath(model)
        return cls(Path(given).name if Path(given).exists() else given, model, None, source.size)

    def in_precision(self, precision: str) -> Self:
        """The same model, cast to fp32, bf16 or fp16."""
        return replace(self, precision=precision)

    def tokenizer(self) -> Any:
        """The tokenizer beside the model on disk.

        Raises:
            FewbitsError: the model is live: it carries none.
        """
        if isinstance(self.model, nn.Module):
            raise FewbitsError(f"{self.name} is a live model and carries no tokenizer: give compare a tokenizer=")
        from fewbits.models.load import AutoTokenizer

        return AutoTokenizer.from_pretrained(self.model)

    def load(self, progress: Callable[[int, int], None] | None = None) -> nn.Module:
        """The model in memory. A live one is copied only if it has to be cast.

        Args:
            progress: called with bytes read and bytes in all.

        Raises:
            FewbitsError: it cannot be read, does not fit, or is quantized and asked for in another precision.
        """
        if isinstance(self.model, nn.Module):
            return self.model if self.precision is None else _cast(self.model, self.precision)
        from fewbits.models.load import AutoModelForCausalLM

        loaded: nn.Module = AutoModelForCausalLM.from_pretrained(
            self.model, precision=self.precision, progress=progress
        )
        return loaded

    def disk_bytes(self, loaded: nn.Module) -> int | None:
        """Bytes of the weights on disk: of its own files, or of a checkpoint of the cast."""
        return self.source_bytes if self.precision is None else checkpoint_bytes(loaded)

    def precision_name(self, loaded: nn.Module) -> str:
        """The precision to show: what was asked for, what the files say, or what the layers hold."""
        if self.precision is not None:
            return self.precision
        if not isinstance(self.model, nn.Module):
            from fewbits.models.source import open_source
            from fewbits.models.stored_dtype import stored_precision

            stored = stored_precision(open_source(self.model))
            if stored is not None:
                return stored.name
        if any(is_quantized(module) for module in loaded.modules()):
            return f"{bits_per_weight(loaded):.1f} bits"
        dtype = next(loaded.parameters()).dtype
        return next((name for name, known in _CASTS.items() if known == dtype), str(dtype).removeprefix("torch."))


def _cast(model: nn.Module, precision: str) -> nn.Module:
    """The model with every stored floating-point tensor in a precision; itself if it is so already.

    Buffers that a checkpoint leaves out stay: a rotary embedding's frequencies in bf16 would be another model.
    """
    dtype = _CASTS[precision]
    if any(is_quantized(module) for module in model.modules()):
        raise FewbitsError(
            f"{type(model).__name__} is quantized and cannot be the reference in {precision}: "
            "give the model it was converted from"
        )
    if all(tensor.dtype == dtype for tensor in model.state_dict().values() if tensor.is_floating_point()):
        return model
    model = copy.deepcopy(model)
    for tensor in model.state_dict(keep_vars=True).values():
        if tensor.is_floating_point():
            tensor.data = tensor.data.to(dtype)
    return model
