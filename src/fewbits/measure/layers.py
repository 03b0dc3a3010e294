"""What quantization does to each layer: the signal-to-quantization-noise ratio (SQNR) of its output.

    SQNR = 10 · log10( Σ y² / Σ (y − ŷ)² )  dB      y: the reference's output, ŷ: the candidate's, for the same input

The input is what the reference's layer was given, for some tokens of the text; so the figure has what the layer itself
loses, its activations' rounding included, and nothing of the layers before it. The output is compared, not the weight:
rotated weights, merged ones, and those of another library's format need no undoing then, and errors that GPTQ has
arranged to cancel do cancel. 6 dB are one bit.

Shapes: S sampled tokens, K input features, N output channels. One model is in memory at a time: the reference leaves
its inputs and outputs, S·(K + N) float32 a layer, in a temporary file.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from fewbits.measure.comparison import Layer
from fewbits.measure.merged import counterparts
from fewbits.measure.scratch import Kept, Scratch
from fewbits.measure.stored_weights import format_and_bits
from fewbits.models.experts import QuantExperts, expert_weights

SAMPLED = 32
"""Tokens that a layer is measured on, evenly spaced in a window; N of them times as many numbers make a sum."""


class ReferenceLayers(ExitStack):
    """The inputs and outputs of a reference's linear layers (and fused experts), for some tokens."""

    def __init__(self, model: Any, window: Tensor) -> None:
        """Run the reference over a window of text.

        Args:
            model: called as `model(input_ids=[1, T])`.
            window: token ids `[T]`.

        Raises:
            FewbitsError: the temporary folder is full.
        """
        super().__init__()
        self._scratch = Scratch("the inputs and outputs of the reference's layers")
        self.callback(self._scratch.close)
        self._kept: dict[str, tuple[tuple[Kept, ...], Kept]] = {}
        self._last: tuple[tuple[Any, ...], tuple[Kept, ...]] = ((), ())
        tokens = len(window)
        step = max(1, tokens // SAMPLED)
        self._sampled = torch.arange(step - 1, tokens, step)  # not the first token: its outliers would be all there is
        self._tokens = tokens
        try:
            self._run(model, window)
        except BaseException:
            self.close()
            raise
        self.layers = tuple(
            Layer(name, *format_and_bits(module), None) for name, module in linears(model).items() if name in self._kept
        )
        """The reference's own layers."""

    def measure(self, model: nn.Module) -> tuple[Layer, ...]:
        """The layers of a candidate, by the reference's names; one that the reference does not have has no SQNR."""
        modules = linears(model)
        shapes = {name: (inputs[0].shape[-1], output.shape[-1]) for name, (inputs, output) in self._kept.items()}
        found, used = [], set[str]()
        for name, counterpart in counterparts(shapes, modules).items():
            module = modules[counterpart.module]
            used.add(counterpart.module)
            channels = slice(counterpart.start, counterpart.stop)
            sqnr = self._sqnr(name, module, channels, _compute_dtype(model, module))
            found.append(Layer(name, *format_and_bits(module), sqnr))
        rest = (Layer(name, *format_and_bits(module), None) for name, module in modules.items() if name not in used)
        return (*found, *rest)

    def _run(self, model: Any, window: Tensor) -> None:
        handles = [
            module.register_forward_hook(self._hook(name), with_kwargs=True) for name, module in linears(model).items()
        ]
        try:
            with torch.inference_mode():
                model(input_ids=window[None].to(getattr(model, "device", window.device)))
        finally:
            for handle in handles:
                handle.remove()
            self._last = ((), ())

    def _hook(self, name: str) -> Callable[..., None]:
        def keep(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            tensors = (*args, output)
            per_token = all(isinstance(each, Tensor) and each.shape[-2:-1] == (self._tokens,) for each in tensors)
            if kwargs or not args or not per_token or name in self._kept:
                return  # experts of their own see some tokens each, and a head may be asked for the last alone
            if len(args) != len(self._last[0]) or any(a is not b for a, b in zip(args, self._last[0], strict=True)):
                self._last = (args, tuple(self._write(each) for each in args))  # query, key and value share theirs
            self._kept[name] = (self._last[1], self._write(output))

        return keep

    def _write(self, tensor: Tensor) -> Kept:
        rows = tensor.reshape(-1, tensor.shape[-1])[self._sampled.to(tensor.device)].cpu()  # [S, K]
        rows = rows.float() if rows.is_floating_point() else rows.long()
        return self._scratch.add(rows)

    def _sqnr(self, name: str, module: nn.Module, channels: slice, dtype: torch.dtype) -> float | None:
        inputs, output = self._kept[name]
        device = next((tensor.device for tensor in (*module.parameters(), *module.buffers())), torch.device("cpu"))
        given = (self._scratch.read(each).to(device) for each in inputs)
        given = (each.to(dtype) if each.is_floating_point() else each for each in given)
        with torch.inference_mode():
            made = module(*given)[..., channels].double().cpu()
        return sqnr_db(self._scratch.read(output).double(), made)


def sqnr_db(signal: Tensor, quantized: Tensor) -> float | None:
    """SQNR of all elements, dB; None if they are equal, or one is NaN or Inf."""
    noise = (signal - quantized).square().sum().item()
    power = signal.square().sum().item()
    if not 0 < noise < math.inf or not 0 < power < math.inf:
        return None
    return 10 * math.log10(power / noise)


def linears(model: nn.Module) -> dict[str, nn.Module]:
    """The modules that multiply by a weight, by name: linear layers of any kind, and fused experts as one."""
    return {name: module for name, module in model.named_modules() if _multiplies(module)}


def _multiplies(module: nn.Module) -> bool:
    return isinstance(module, (nn.Linear, Conv1D, QuantExperts)) or bool(expert_weights(module))


def _compute_dtype(model: nn.Module, module: nn.Module) -> torch.dtype:
    """What a layer is given in its model: the dtype of its own weight, or where that is codes, of the norms."""
    for tensor in (*_own_weights(module), *(each for each in model.parameters() if each.ndim == 1)):
        if tensor.is_floating_point() and tensor.dtype.itemsize > 1:
            return tensor.dtype
    return torch.float32


def _own_weights(module: nn.Module) -> Iterator[Tensor]:
    weight = getattr(module, "weight", None)
    if isinstance(weight, Tensor):
        yield weight
    yield from expert_weights(module).values()
