"""Text that a search checks its choices on, apart from what it measures layers on and calibrates with.

Letters: W windows, T tokens in each, P positions looked at, V tokens of the vocabulary.
"""

from __future__ import annotations

import inspect
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor

from fewbits.errors import FewbitsError
from fewbits.models.text import built_in_text, read_text
from fewbits.quantize.calibrate import WINDOW_TOKENS, WINDOWS, calibration_windows
from fewbits.tensors.divergence import kl_divergence

_HELD_OUT = 8  # windows
_BUILT_IN_START = 50_000  # behind what layers are calibrated on, which ends at token 46,384
Progress = Callable[[int, int], None]
"""Called with windows done and windows in all."""

_EVERY = 2  # positions: neighbours tell much the same, and the head is a quarter of the work


def split_text(
    tokenizer: transformers.PreTrainedTokenizerBase, text: Path | None, most_tokens: int
) -> tuple[Tensor, Tensor]:
    """Windows to calibrate on, and windows to check on: token ids ``[W, T]`` each.

    Of one's own text the windows behind those to calibrate on are held out, or its last quarter if it is short.

    Args:
        tokenizer: The model's.
        text: A UTF-8 file; None: the built-in text, but for what quality is measured on.
        most_tokens: The model's context.

    Raises:
        FewbitsError: If the text cannot be read, or does not fill two windows.
    """
    length = min(WINDOW_TOKENS, most_tokens)
    start = _BUILT_IN_START if text is None else 0
    content = built_in_text() if text is None else read_text(text)
    ids = torch.tensor(tokenizer(content, add_special_tokens=False, verbose=False)["input_ids"][start:])
    windows = ids[: len(ids) // length * length].view(-1, length)
    if text is None and len(windows) > 0:
        return calibration_windows(tokenizer, None, most_tokens), windows[:_HELD_OUT]
    if len(windows) < 2:
        raise FewbitsError(
            f"a contract needs two windows of {length} tokens, one to calibrate on and one to check, and "
            f"{text or 'the built-in text'} has {len(ids)} tokens; give a longer text"
        )
    held_out = min(_HELD_OUT, max(1, len(windows) // 4))
    calibrated = min(WINDOWS, len(windows) - held_out)
    return windows[:calibrated], windows[calibrated : calibrated + held_out]


class HeldOut:
    """What the model in float32 says of the held-out windows, kept in a temporary file."""

    def __init__(self, model: Any, windows: Tensor, progress: Progress) -> None:
        """Run the model over the windows ``[W, T]``."""
        self._windows, self._file = windows, tempfile.TemporaryFile()  # noqa: SIM115 - closed by close()
        for done, log_p in enumerate(log_probabilities(model, windows[:, None]), start=1):
            self._file.write(log_p.numpy().data)
            progress(done, len(windows))

    def kl(self, model: Any, progress: Progress) -> float:
        """KL(the model in float32 || this one), mean over positions, nats per token."""
        self._file.seek(0)
        found = []
        for done, log_q in enumerate(log_probabilities(model, self._windows[:, None]), start=1):
            log_p = torch.from_numpy(np.fromfile(self._file, np.float32, log_q.numel()))
            found.append(kl_divergence(log_p.view(log_q.shape), log_q))
            progress(done, len(self._windows))
        return torch.cat(found).mean().item()

    def close(self) -> None:
        """Give the file back."""
        self._file.close()


def log_probabilities(model: Any, batches: Tensor) -> Iterator[Tensor]:
    """Of every second position, ``[P, V]`` of one batch of windows ``[B, T]`` after the other."""
    positions = torch.arange(1, batches.shape[-1], _EVERY)
    kept = "logits_to_keep" in inspect.signature(model.forward).parameters
    options = {"use_cache": False} | ({"logits_to_keep": positions} if kept else {})
    for batch in batches:
        with torch.inference_mode():
            logits = model(input_ids=batch, **options).logits
            logits = logits if kept else logits[:, positions]
            yield torch.log_softmax(logits.flatten(0, 1).float(), dim=-1)
