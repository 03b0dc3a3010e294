"""Low-precision matmuls as hardware computes them: operands in a narrow format, sums in float32, one rounding.

    forward          y  = round(x̂ · ŵᵀ + b̂)        ^: rounded to the operands' format
    gradient of x    dx = round(ĝ · ŵ)             round: to the format of the results, once
    gradient of w    dw = round(ĝᵀ · x̂)

8-bit operands go through the FP8 units of a GPU that has them (``fp8_product``); else bfloat16 holds their values.

On a CPU without fp16 the operands are widened to float32, where products of fp16 numbers are exact: what a tensor
core computes, up to the order of the sums. bf16 runs natively where the CPU has instructions for it.

Letters: M tokens, K input features, N output features.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any, Protocol, cast

import torch
from torch import Tensor

from fewbits.formats import Format
from fewbits.train import fp8_product
from fewbits.train.recipe import Recipe, is_eight_bit
from fewbits.train.scaling import AmaxHistory, scale_amax, scaled_round

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@cache
def runs_natively(device: str, dtype: torch.dtype) -> bool:
    """Whether a matmul of this dtype is as fast as it can be on such a device, and adds up in float32."""
    if device != "cpu" or dtype == torch.float32:
        return True
    return dtype == torch.bfloat16 and bool(torch.cpu._is_avx512_bf16_supported())


def product(a: Tensor, b: Tensor, dtype: torch.dtype, bias: Tensor | None = None) -> Tensor:
    """Multiply ``[M, K]`` by ``[K, N]`` of one dtype; float32 sums, and the bias, are rounded to ``dtype`` once."""
    if a.dtype == dtype and runs_natively(a.device.type, dtype):
        return torch.mm(a, b) if bias is None else torch.addmm(bias.to(dtype), a, b)
    bias = None if bias is None else bias.to(dtype).float()
    largest = max(a.numel(), b.numel(), a.shape[0] * b.shape[1])
    if dtype == torch.float32 or a.device.type != "cpu" or largest <= 2 * _SLICE:
        return _widened_product(a, b, bias).to(dtype)
    return _sliced_product(a, b, dtype, bias)


_SLICE = 1 << 21  # elements that are widened at a time: 8 MiB, which the last cache holds and the allocator keeps


def _widened_product(a: Tensor, b: Tensor, bias: Tensor | None) -> Tensor:
    return torch.mm(a.float(), b.float()) if bias is None else torch.addmm(bias, a.float(), b.float())


def _sliced_product(a: Tensor, b: Tensor, dtype: torch.dtype, bias: Tensor | None) -> Tensor:
    """The same for large operands, slice by slice along the longest of M, K and N: no large float32 copy is made."""
    (M, K), N = a.shape, b.shape[1]
    if max(M, N) <= K:
        sums = a.new_zeros((M, N), dtype=torch.float32) if bias is None else bias.expand(M, N).clone()
        for part in _slices(K, max(M, N)):
            sums.addmm_(a[:, part].float(), b[part].float())
        return sums.to(dtype)
    out = torch.empty((M, N), dtype=dtype)
    if M <= N:
        wide = a.float()
        for part in _slices(N, max(M, K)):
            out[:, part] = _widened_product(wide, b[:, part], None if bias is None else bias[part])
    else:
        wide = b.float()
        for part in _slices(M, max(N, K)):
            out[part] = _widened_product(a[part], wide, bias)
    return out


def _slices(length: int, width: int) -> Iterator[slice]:
    step = max(1, _SLICE // width)
    return (slice(start, min(start + step, length)) for start in range(0, length, step))


class Observer(Protocol):
    """Sees what goes into the matmuls and comes out; see ``fewbits.train.preflight``."""

    def operand(self, key: str, before: Tensor, after: Tensor, fmt: Format, amax: Tensor | None, square: bool) -> None:
        """An operand was rounded; ``key`` is the module and weight, activation or gradient; else as scaled_round."""

    def result(self, key: str, result: Tensor) -> None:
        """A matmul gave this; ``key`` is the module and output, input_gradient or weight_gradient."""

    def matmul(self, func: Any, args: tuple[Any, ...], result: Any) -> None:
        """A function other than a known linear layer was called, with operands rounded to the results' format."""


@dataclass
class Operands:
    """Rounds what goes into the matmuls of a recipe; weights once a step.

    Attributes:
        recipe: The formats.
        history: Of delayed scaling.
        observer: Sees all that is rounded.
        holds_weights: Whether rounded weights are held until they change; else they are rounded at each use.
    """

    recipe: Recipe
    history: AmaxHistory
    observer: Observer | None = None
    holds_weights: bool = True

    def __post_init__(self) -> None:
        self.dtype = DTYPES[self.recipe.results.name]
        self._weights: dict[tuple[int, bool], tuple[weakref.ref[Tensor], int, Tensor]] = {}
        self.both_ways = self.recipe.scaling in ("row", "block")

    def forget_weights(self) -> None:
        """Let go of the copies of weights that have changed; those of frozen ones stay."""
        for key, (weight, version, _) in list(self._weights.items()):
            held = weight()
            if held is None or held._version != version:
                del self._weights[key]

    def replace_weight(self, weight: Tensor, rounded: Tensor) -> None:
        """The optimizer has made the copy of a weight while it updated it."""
        self._weights[id(weight), False] = (weakref.ref(weight), weight._version, rounded)

    def copy_of(self, weight: Tensor) -> Tensor | None:
        """The copy of a weight that is there now, for the optimizer to write into; None if there is none."""
        held = self._weights.get((id(weight), False))
        return held[2] if held and held[0]() is weight else None

    def copy_bytes(self) -> int:
        """Bytes of the rounded weights that are held."""
        return sum(held[2].nbytes for held in self._weights.values())

    def weight(self, weight: Tensor, name: str, transposed: bool) -> Tensor:
        """The weight ``[N, K]`` as matmuls read it; ``transposed``: with scales for sums over N."""
        fmt = self.recipe.weights
        transposed = transposed and self.recipe.scaling == "row" and is_eight_bit(fmt)  # square blocks serve both
        key = (id(weight), transposed)
        held = self._weights.get(key)
        if held and held[0]() is weight and held[1] == weight._version:
            return held[2]
        with torch.no_grad():
            source = weight.detach()
            if transposed:
                rounded = self._round(source.t(), fmt, f"{name} weight", True).t()
            else:
                rounded = self._round(source, fmt, f"{name} weight", True)
        if self.holds_weights and rounded.data_ptr() != weight.data_ptr():
            self._weights[key] = (weakref.ref(weight), weight._version, rounded)
        return rounded

    def activation(self, x: Tensor, name: str) -> Tensor:
        """Activations ``[R, C]`` as a matmul over C reads them."""
        return self._round(x, self.recipe.activations, f"{name} activation", False)

    def gradient(self, g: Tensor, name: str) -> Tensor:
        """Gradients ``[R, C]`` as a matmul over C reads them."""
        return self._round(g, self.recipe.gradients, f"{name} gradient", False)

    def product(self, a: Tensor, a_fmt: Format, b: Tensor, b_fmt: Format, bias: Tensor | None = None) -> Tensor:
        """Multiply rounded operands, ``[M, K]`` by ``[K, N]``; sums, and the bias, are rounded to the results once."""
        if fp8_product.takes(a, a_fmt, b, b_fmt, self.recipe.scaling, self.dtype):
            return fp8_product.fp8_product(a, a_fmt, b, b_fmt, self.recipe.scaling, self.dtype, bias)
        return product(*_alike(a, b), self.dtype, bias)

    def _round(self, x: Tensor, fmt: Format, key: str, square: bool) -> Tensor:
        amax = None
        if not is_eight_bit(fmt):
            rounded = x.to(self.dtype)
        elif x.numel() == 0:
            return x.bfloat16()
        else:
            amax = scale_amax(x, self.recipe.scaling, self.history, key, square)
            rounded = scaled_round(x, fmt, amax, square)
        if self.observer is not None:
            self.observer.operand(key, x, rounded, fmt, amax, square)
        return rounded


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, operands: Operands, name: str) -> Tensor:
        tokens = x.reshape(-1, x.shape[-1]).to(operands.dtype)  # [M, K]
        rounded = operands.activation(tokens, name)
        held = operands.weight(weight, name, transposed=False)  # [N, K]
        recipe = operands.recipe
        y = operands.product(rounded, recipe.activations, held.t(), recipe.weights, bias)
        if operands.observer is not None:
            operands.observer.result(f"{name} output", y)
        ctx.operands, ctx.name, ctx.x_dtype, ctx.x_shape = operands, name, x.dtype, x.shape
        # Where scales run along the sums, the backward pass rounds anew, along other sums.
        ctx.save_for_backward(tokens if operands.both_ways else rounded, weight)
        return y.view(*x.shape[:-1], weight.shape[0])

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors  # with checkpoints they are computed again here, by the policy
        # It is on in the backward pass too, and would round these operands and sums a second time.
        with torch._C.DisableTorchFunction():
            return _Linear._gradients(ctx, saved, gradients[0])

    @staticmethod
    def _gradients(ctx: Any, saved: tuple[Tensor, Tensor], gradient: Tensor) -> tuple[Tensor | None, ...]:
        operands, name = ctx.operands, ctx.name
        recipe = operands.recipe
        x, weight = saved
        g = gradient.reshape(-1, gradient.shape[-1]).to(operands.dtype)  # [M, N]
        dx = dw = db = None
        rounded = operands.gradient(g, name)
        if ctx.needs_input_grad[0]:
            held = operands.weight(weight, name, transposed=True)
            dx = operands.product(rounded, recipe.gradients, held, recipe.weights).view(ctx.x_shape).to(ctx.x_dtype)
        if ctx.needs_input_grad[1]:
            gt = operands.gradient(g.t(), name) if operands.both_ways else rounded.t()
            xt = operands.activation(x.t(), name).t() if operands.both_ways else x
            dw = operands.product(gt, recipe.gradients, xt, recipe.activations)
        if ctx.needs_input_grad[2]:
            db = g.sum(0, dtype=torch.float32)
        if operands.observer is not None:
            for kind, result in (("input_gradient", dx), ("weight_gradient", dw)):
                if result is not None:
                    operands.observer.result(f"{name} {kind}", result)
        return dx, dw, db, None, None


def _alike(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Two operands of one dtype: the wider one's, which holds both."""
    if a.dtype == b.dtype:
        return a, b
    return a.float(), b.float()


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, operands: Operands, name: str) -> Tensor:
    """``x · wᵀ + b`` by a recipe.

    Args:
        x: ``[..., K]``, any float dtype.
        weight: The master weight, float32 ``[N, K]``, or bfloat16 where masters are kept so.
        bias: ``[N]`` or None.
        operands: Rounds by the recipe, and holds the rounded weights.
        name: Of the weight; delayed scaling keeps its history under it.

    Returns:
        ``[..., N]`` in the format of the results. Inf and NaN behave as in IEEE arithmetic; an 8-bit operand that has
        one makes the whole result NaN.
    """
    return cast(Tensor, _Linear.apply(x, weight, bias, operands, name))  # type: ignore[no-untyped-call]
