"""How fast a model reads a prompt (prefill) and writes tokens after it (decode).

Shapes: P tokens of prompt, N tokens written.
"""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from fewbits.errors import FewbitsError

PROMPT_TOKENS = 512
NEW_TOKENS = 32
REPEATS = 3


@dataclass(frozen=True)
class Speed:
    """Tokens per second, each the best of the repeats: other programs on the machine only ever slow a run down."""

    prefill: float
    """Tokens of the prompt read in one forward pass, per second."""
    decode: float
    """Tokens written one at a time after the prompt, per second."""


def measure_speed(
    model: Any,
    prompt: torch.Tensor,
    new_tokens: int = NEW_TOKENS,
    repeats: int = REPEATS,
    progress: Callable[[int, int], None] | None = None,
) -> Speed:
    """Time a prompt, and greedy tokens after it with a key-value cache.

    Every model is measured alike: its own `forward` with `past_key_values`, no generation loop around it. The head
    is computed for the prompt's last token only, where the model offers that (`logits_to_keep`).

    Args:
        model: a transformers causal language model.
        prompt: token ids [P].
        new_tokens: tokens to write (N).
        repeats: runs, of which the best counts.
        progress: called after each run with runs done and runs in all.

    Raises:
        FewbitsError: the prompt is empty, a count is below 1, or the model keeps no cache.
    """
    for name, value in {"prompt tokens": prompt.numel(), "new_tokens": new_tokens, "repeats": repeats}.items():
        if value < 1:
            raise FewbitsError(f"{name} is {value}: speed needs at least 1")
    prompt = prompt.view(1, -1).to(model.device)
    last_only = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}
    prefill, decode = float("inf"), float("inf")
    for done in range(1, repeats + 1):
        read, written = time_once(model, prompt, new_tokens, last_only)
        prefill, decode = min(prefill, read), min(decode, written)
        if progress:
            progress(done, repeats)
    return Speed(prefill=prompt.numel() / prefill, decode=new_tokens / decode)


def time_once(model: Any, prompt: torch.Tensor, new_tokens: int, last_only: dict[str, int]) -> tuple[float, float]:
    """Seconds for the prompt [1, P], and for N tokens after it."""
    with torch.inference_mode():
        started = _now(prompt.device)
        output = model(input_ids=prompt, use_cache=True, **last_only)
        token = output.logits[:, -1:].argmax(-1)  # [1, 1]
        read = _now(prompt.device)
        for _ in range(new_tokens):
            cache = output.past_key_values
            if cache is None:
                raise FewbitsError(
                    f"{type(model).__name__} returns no past_key_values: decode speed needs a key-value cache"
                )
            output = model(input_ids=token, past_key_values=cache, use_cache=True)
            token = output.logits[:, -1:].argmax(-1)
        written = _now(prompt.device)
    return read - started, written - read


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)  # kernels run behind the program: wait for them before reading the clock
    return time.perf_counter()
