"""A trained model as a folder that ``from_pretrained`` reads; adapters as PEFT writes them."""

from __future__ import annotations

import json
import os
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fewbits.models.loading import quiet
from fewbits.models.staging import MARK
from fewbits.models.stored_dtype import nominal_dtype
from fewbits.train.loop import Loop


def output_bytes(loop: Loop) -> int:
    """About how many bytes ``write_trained`` writes of tensors."""
    if loop.settings.lora is not None:
        return sum(param.nbytes for param in loop.model.parameters() if param.requires_grad)
    return sum(param.numel() for param in loop.model.parameters()) * nominal_dtype(loop.source).itemsize


def write_trained(loop: Loop, folder: Path) -> None:
    """Write the model, or its adapters, with the tokenizer and a record of the run.

    A model takes the dtype of the one it was made from, or float32 where a weight has outgrown that.

    The loop cannot go on after that: its weights are rounded.

    Raises:
        OSError: It cannot be written.
    """
    with quiet(silent=True):
        _write_tensors(loop, folder)
    loop.source.tokenizer().save_pretrained(folder)
    record = {
        "fewbits": version("fewbits"),
        "source": loop.source.path.name,
        "trained": {**loop.settings.to_json(), "model": loop.source.path.name, "text": Path(loop.settings.text).name},
        "skipped": sum(report.skipped for report in loop.reports),
    }
    (folder / MARK).write_text(json.dumps(record, indent=1) + "\n")
    for path in folder.iterdir():  # safetensors makes files that only their owner can read
        path.chmod((folder / MARK).stat().st_mode)
    _flush(folder)


def _write_tensors(loop: Loop, folder: Path) -> None:
    model: Any = loop.model
    if loop.settings.lora is not None:
        model.save_pretrained(folder)
        return
    # In place: nothing is trained any more, and two copies may not fit.
    model.to(_fitting_dtype(model, nominal_dtype(loop.source))).save_pretrained(folder)


def _fitting_dtype(model: nn.Module, dtype: torch.dtype) -> torch.dtype:
    largest = max(float(param.detach().abs().max()) for param in model.parameters())
    return dtype if largest <= torch.finfo(dtype).max else torch.float32


def _flush(folder: Path) -> None:
    """Bring all files to the disk before the folder takes its name."""
    for path in folder.iterdir():
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
