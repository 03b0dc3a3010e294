"""What the operands of matmuls are called where they are looked at: a module and a kind.

weight, activation, gradient      what matmuls read; the gradient is that of the module's output
output, input_gradient, weight_gradient      what they give
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from fewbits.formats import Format

Key = tuple[str, str]
"""Module and kind."""


class ModuleNames:
    """Names the matmuls that are no linear layers after the module that calls them."""

    def __init__(self) -> None:
        self._running: list[str] = []

    @contextmanager
    def watching(self, model: nn.Module) -> Iterator[None]:
        """Follow which module of the model is running."""
        with ExitStack() as hooks:
            for name, module in model.named_modules():
                hooks.callback(module.register_forward_pre_hook(self._enter(name)).remove)
                hooks.callback(module.register_forward_hook(self._leave, always_call=True).remove)
            yield
            self._running.clear()

    def _enter(self, name: str) -> Callable[..., None]:
        return lambda module, args: self._running.append(name)

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        if self._running:
            self._running.pop()

    def name_of(self, func: Callable[..., Any]) -> str:
        """The running module and the function, as in ``layers.0.attention.matmul``; a convolution is its module."""
        inside = self._running[-1] if self._running else ""
        if inside and _is_convolution(func):
            return inside
        called = getattr(func, "__name__", "matmul").strip("_")
        return f"{inside}.{called}" if inside else called

    def matmul(self, func: Any, args: tuple[Any, ...], result: Any) -> None:
        """Take a function's operands one by one, and the gradient of its result when that comes."""
        name = self.name_of(func)
        weighted = func is functional.linear or _is_convolution(func)
        tensors = [arg for arg in args[: 2 if weighted else 3] if isinstance(arg, Tensor) and arg.is_floating_point()]
        for place, tensor in enumerate(tensors):
            self.plain(f"{name} {'weight' if weighted and place else 'activation'}", tensor)
        if isinstance(result, Tensor):
            self.result(f"{name} output", result)
            if result.requires_grad:
                result.register_hook(  # type: ignore[no-untyped-call]
                    lambda gradient: self.plain(f"{name} gradient", gradient)
                )

    def plain(self, key: str, x: Tensor) -> None:
        """An operand in the format of the results."""
        self.operand(key, x, x, _FORMATS[x.dtype], None, False)

    def operand(self, key: str, before: Tensor, after: Tensor, fmt: Format, amax: Tensor | None, square: bool) -> None:
        """An operand of a matmul; see ``fewbits.train.matmul.Observer``."""
        raise NotImplementedError

    def result(self, key: str, result: Tensor) -> None:
        """What a matmul gave."""


_FORMATS = {
    torch.float32: Format.named("fp32"),
    torch.float16: Format.named("fp16"),
    torch.bfloat16: Format.named("bf16"),
}


def _is_convolution(func: Any) -> bool:
    return getattr(func, "__name__", "").startswith("conv")


def split_key(key: str) -> Key:
    """Module and kind of ``layers.0.up weight``."""
    module, _, kind = key.rpartition(" ")
    return module, kind
