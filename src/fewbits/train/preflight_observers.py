"""Who looks at the operands of matmuls: a recorder in a float32 run, a counter in a run of low precision.

Both are told by the same lines of ``fewbits.train.matmul``, so a prediction and its check count the same tensors.
The name of an operand is its module and its kind:

    weight, activation, gradient      what matmuls read; the gradient is that of the module's output
    output, input_gradient, weight_gradient      what they give
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from fewbits.errors import FewbitsError
from fewbits.formats import Format, exact
from fewbits.train.exponents import Counts, Histogram
from fewbits.train.recipe import Recipe, is_eight_bit
from fewbits.train.scaling import AmaxHistory, scale_amax, scale_exponents

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


@dataclass
class Record:
    """What a float32 run tells about one operand or result.

    Attributes:
        fmt: The format that it would take.
        raw: Its values.
        scaled: In an 8-bit format: its values times the scales that the recipe gives them.
        scales: How often each scale 2^k was given to a whole tensor, by k.
    """

    fmt: Format
    raw: Histogram = field(default_factory=Histogram)
    scaled: Histogram | None = None
    scales: Counter[int] = field(default_factory=Counter)

    @property
    def seen(self) -> Histogram:
        """The values as the format sees them, but for the loss scale."""
        return self.raw if self.scaled is None else self.scaled


class Recorder(ModuleNames):
    """Histograms of all operands in a float32 run, and of 8-bit ones with the scales of a recipe.

    Args:
        recipe: The one that is asked about.
        kept: The linear layers that it keeps.
    """

    def __init__(self, recipe: Recipe, kept: set[str]) -> None:
        super().__init__()
        self.recipe, self._kept = recipe, kept
        self.records: dict[Key, Record] = {}
        self.linears: set[str] = set()
        self._history = AmaxHistory(recipe.history)
        self._weights: set[str] = set()
        self._last: tuple[Tensor, int, Counts] | None = None

    def operand(self, key: str, before: Tensor, after: Tensor, fmt: Format, amax: Tensor | None, square: bool) -> None:
        """Record an operand; the weights, which do not change, once.

        Raises:
            FewbitsError: It has NaN.
        """
        module, kind = split_key(key)
        self._add(key, before, self._format(module, kind), square)

    def plain(self, key: str, x: Tensor) -> None:
        """Record an operand of what is no linear layer."""
        self._add(key, x, self.recipe.results, False)

    def _add(self, key: str, x: Tensor, fmt: Format, square: bool) -> None:
        module, kind = split_key(key)
        if kind == "weight":
            if key in self._weights:
                return
            self._weights.add(key)
        counts = self._counts(x)
        if counts.nan:
            raise FewbitsError(
                f"{module or 'the model'}: {counts.nan} of {x.numel()} values of its {kind} are NaN in fp32 already; "
                "repair the model first: no precision can be judged by NaN"
            )
        record = self._record(module, kind, fmt)
        record.raw.add(counts)
        if record.scaled is not None:
            self._add_scaled(record, x, counts, key, square)

    def result(self, key: str, result: Tensor) -> None:
        """Record what a matmul gave; linear layers give gradients of weights and inputs."""
        module, kind = split_key(key)
        if kind == "weight_gradient":
            self.linears.add(module)
            counts = Counts.of(result)
        else:
            low, high = torch.aminmax(result.detach().float()) if result.numel() else (result.new_zeros(()),) * 2
            counts = Counts.none(max(-float(low), float(high)))
        fmt = self.recipe.kept if module in self._kept else self.recipe.results
        self._record(module, kind, fmt).raw.add(counts)

    def end_step(self) -> None:
        """A step is over: delayed scaling looks back by steps."""
        self._history.end_step(keep=True)
        self._last = None

    def _format(self, module: str, kind: str) -> Format:
        if module in self._kept:
            return self.recipe.kept
        fields = {"weight": self.recipe.weights, "activation": self.recipe.activations}
        return fields.get(kind, self.recipe.gradients)

    def _record(self, module: str, kind: str, fmt: Format) -> Record:
        if (module, kind) not in self.records:
            self.records[module, kind] = Record(fmt, scaled=Histogram() if is_eight_bit(fmt) else None)
        return self.records[module, kind]

    def _counts(self, x: Tensor) -> Counts:
        """Layers that read the same tensor one after the other count it once."""
        if self._last is not None:
            last, version, counts = self._last
            if last.data_ptr() == x.data_ptr() and last.shape == x.shape and version == x._version:
                return counts
        counts = Counts.of(x)
        self._last = (x.detach(), x._version, counts)
        return counts

    def _add_scaled(self, record: Record, x: Tensor, counts: Counts, key: str, square: bool) -> None:
        assert record.scaled is not None
        for rows in self._orientations(x, square):
            # Operands are in the format of the results before they get 8 bits.
            amax = scale_amax(rows, self.recipe.scaling, self._history, key, square)
            amax = amax.to(torch.bfloat16 if self.recipe.results.name == "bf16" else torch.float32).float()
            exponents = scale_exponents(rows, record.fmt, amax, square)
            if exponents.ndim == 0 and bool(exponents.isfinite()):
                record.scales[int(exponents)] += 1
                record.scaled.add(counts.scaled(int(exponents)))
            else:
                record.scaled.add(Counts.of(rows * torch.exp2(exponents)))

    def _orientations(self, x: Tensor, square: bool) -> tuple[Tensor, ...]:
        """Where scales run along the sums, the backward pass rounds anew along other sums."""
        both = self.recipe.scaling == "row" or (self.recipe.scaling == "block" and not square)
        return (x, x.t()) if both else (x,)


@dataclass
class Tally:
    """What was counted of one operand in a run of low precision.

    Attributes:
        values: How many values were read.
        zeros: How many of them were zero, or became so.
        zeroed: How many of them the last cast made zero. To 8 bits there is one cast; a 16-bit operand may have got its
            zeros before, when it was the result of another operation.
        subnormal: How many were subnormal numbers of the format.
        saturated: How many were Inf, or beyond the format's range before they were rounded.
        nan: How many were NaN.
        scales: How often each scale 2^k was given to a whole 8-bit tensor, by k.
    """

    values: int = 0
    zeros: int = 0
    zeroed: int = 0
    subnormal: int = 0
    saturated: int = 0
    nan: int = 0
    scales: Counter[int] = field(default_factory=Counter)


class OperandCounter(ModuleNames):
    """Counts zeros, subnormal and saturated values as the matmuls of a real run read them.

    counter = OperandCounter()
    mp.policy.observe(counter)
    with counter.watching(model):
        …  # train
    counter.tallies["layers.0.up", "gradient"].zeros
    """

    def __init__(self) -> None:
        super().__init__()
        self.tallies: dict[Key, Tally] = {}

    def operand(self, key: str, before: Tensor, after: Tensor, fmt: Format, amax: Tensor | None, square: bool) -> None:
        """Count an operand."""
        tally = self.tallies.setdefault(split_key(key), Tally())
        exponents = None if amax is None else scale_exponents(after, fmt, amax, square)
        magnitude = _up(after, exponents).abs()
        tally.values += magnitude.numel()
        zero = magnitude == 0
        tally.zeros += int(zero.sum())
        tally.zeroed += int((zero & (before != 0)).sum())
        tally.subnormal += int(((magnitude > 0) & (magnitude < fmt.smallest_normal)).sum())
        tally.nan += int(magnitude.isnan().sum())
        if exponents is None:
            tally.saturated += int(magnitude.isinf().sum())
        else:
            beyond = float(fmt.max + exact.ulp(fmt.max, fmt) / 2)
            if exponents.ndim == 0 and bool(exponents.isfinite()):
                tally.scales[int(exponents)] += 1
            tally.saturated += int((_up(before, exponents).abs() > beyond).sum())


def _up(x: Tensor, exponents: Tensor | None) -> Tensor:
    wide = x.detach().float()
    return wide if exponents is None else wide * torch.exp2(exponents)
