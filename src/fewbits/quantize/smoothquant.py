"""SmoothQuant: what is large in activations is made smaller, and the weights that read it larger, channel by channel.

    y = x Wᵀ = (x / s) (W s)ᵀ        s = max|x|^α / max|W|^(1 − α) of each input feature, α = 1/2

Activations have a scale per token, so one large channel costs all others their bits; weights can bear some of it.
x / s takes no time where it is folded into what gives x:

    a norm -> the layers that read it           gain / s
    v_proj -> o_proj                            rows of v / s, one s for all query heads that share a head of values
    up_proj -> down_proj                        rows of up / s, since x = act(gate) · up

A norm's gain is stored in 16 bits and not quantized: there s is a power of two, so that folding rounds nothing. max|x|
is found by running text through the model block by block. Source: Xiao et al., "SmoothQuant" (arXiv 2211.10438),
sections 4 and 5.

Letters: N output channels, K input features, W windows, T tokens in each.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from fewbits.errors import FewbitsError
from fewbits.models.source import Source
from fewbits.quantize.blocks import Blocks
from fewbits.quantize.folding import Change, FoldedSource, Folds, foldable, scales_of, together

NAME = "smoothquant"
_CLOSE = 1e-4  # of its length, to which a block's output must stay what it is; the order of sums takes 1e-6


@dataclass(frozen=True)
class _Pair:
    """What gives a tensor, and the layers that read it.

    Attributes:
        giver: The module whose output channels are divided.
        readers: The layers whose input features are multiplied.
        is_norm: Whether it is a norm.
        first: The first of the giver's channels that are meant: up follows gate in one tensor in some models.
        shared: Channels that follow one another in one head, and how many heads of the readers' input share one of the
            giver's; None: the channels are the same.
    """

    giver: str
    readers: tuple[str, ...]
    is_norm: bool = False
    first: int = 0
    shared: tuple[int, int] | None = None


def smoothquant(source: Source, windows: Tensor, progress: Callable[[int, int], None] | None = None) -> FoldedSource:
    """Fold scales of channels into the weights of a model; the text runs through it now, the rest is done when read.

    Args:
        source: The model.
        windows: Token ids ``[W, T]``.
        progress: Called with blocks done and blocks in all.

    Raises:
        FewbitsError: If the model is quantized or is not one stack of blocks, activations are NaN or Inf (the layer is
            named), or a block does not compute the same with scales folded into it.
    """
    model, places = foldable(source, NAME)
    blocks = Blocks(source, model, places, windows)
    stored = {place.parameter: name for name, place in places.items()}
    changes: dict[str, Change] = {}
    with torch.no_grad():
        blocks.catch()
        for index in range(len(blocks)):
            path = blocks.path(index)
            for name, change in _fold(blocks, index, path).items():
                changes[stored[f"{path}{name}"]] = change
            if progress is not None:
                progress(index + 1, len(blocks))
    return FoldedSource(source, Folds(changes))


def _fold(blocks: Blocks, index: int, path: str) -> dict[str, Change]:
    """Run the text through a block; what is done to its parameters, by their names in it."""
    block = blocks.filled(index)
    watch = _Watch(block)
    before = blocks.inputs
    blocks.inputs = [blocks.through(block, x) for x in before]
    watch.stop()
    _check_finite(watch.largest, blocks.inputs, path)
    changes: dict[str, list[Change]] = {}
    for pair in watch.pairs():
        _fold_pair(block, pair, watch.largest, changes)
    made = {name: together(*each) for name, each in changes.items()}
    for name, parameter in block.named_parameters():
        if name in made:
            parameter.data = made[name](parameter.data)
    after, expected = blocks.through(block, before[0]), blocks.inputs[0]
    if not (after - expected).norm() <= _CLOSE * expected.norm():
        raise FewbitsError(
            f"method={NAME!r}: {path.removesuffix('.')} is not the same with scales folded into its layers: something "
            "else reads what its norms give; use gptq or mse without it"
        )
    return made


def _check_finite(largest: dict[str, Tensor], outputs: list[Tensor], path: str) -> None:
    """Name the first layer that is given something that is not finite, or the last one if it is what gives it."""
    bad = next((name for name, each in largest.items() if not each.isfinite().all()), None)
    if bad is None and not all(each.isfinite().all() for each in outputs):
        bad = list(largest)[-1]
    if bad is not None:
        raise FewbitsError(
            f"{path}{bad}.weight: the calibration gave activations that are NaN or Inf; calibrate on other text"
        )


def _fold_pair(block: nn.Module, pair: _Pair, largest: dict[str, Tensor], changes: dict[str, list[Change]]) -> None:
    """Add what is done to the parameters of a pair."""
    activations = torch.stack([largest[reader] for reader in pair.readers]).amax(0)
    readers = [block.get_submodule(reader) for reader in pair.readers]
    weights = torch.stack([_features_last(each).abs().amax(0) for each in readers]).amax(0)
    if pair.is_norm:
        given = read = torch.exp2(scales_of(activations, weights).log2().round())
    else:
        width, heads = pair.shared or (1, 1)
        activations, weights = (each.view(-1, heads, width).amax(1).flatten() for each in (activations, weights))
        given = scales_of(activations, weights)
        read = given.view(-1, 1, width).expand(-1, heads, -1).flatten()
    giver = block.get_submodule(pair.giver)
    for name, _ in giver.named_parameters():
        changes.setdefault(f"{pair.giver}.{name}", []).append(
            _divided(given, pair.first, _one(giver) if name == "weight" else 0.0)
        )
    for name, reader in zip(pair.readers, readers, strict=True):
        changes.setdefault(f"{name}.weight", []).append(_multiplied(read, isinstance(reader, Conv1D)))


class _Watch:
    """Sees what each layer of a block is given: its largest magnitudes, and which norm gave it."""

    def __init__(self, block: nn.Module) -> None:
        self._block = block
        self.largest: dict[str, Tensor] = {}
        self._norm_of: dict[str, str] = {}
        self._given: dict[str, Tensor] = {}  # by each norm, last
        self._hooks = []
        for name, module in block.named_modules():
            if isinstance(module, (nn.Linear, Conv1D)):
                self._hooks.append(module.register_forward_pre_hook(self._sees(name)))
            elif isinstance(getattr(module, "weight", None), nn.Parameter) and module.weight.ndim == 1:
                self._hooks.append(module.register_forward_hook(self._norm_gave(name)))

    def _sees(self, name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def see(_: nn.Module, given: tuple[Tensor, ...]) -> None:
            x = given[0]
            most = x.reshape(-1, x.shape[-1]).abs().amax(0)
            self.largest[name] = torch.maximum(most, self.largest[name]) if name in self.largest else most
            for norm, result in self._given.items():
                if result is x:
                    self._norm_of[name] = norm

        return see

    def _norm_gave(self, name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        def gave(_: nn.Module, __: tuple[Tensor, ...], x: Tensor) -> None:
            self._given[name] = x

        return gave

    def stop(self) -> None:
        """See no more."""
        for hook in self._hooks:
            hook.remove()
        self._given.clear()

    def pairs(self) -> list[_Pair]:
        """What can be folded into what, in this block."""
        readers: dict[str, list[str]] = {}
        for name, norm in self._norm_of.items():
            readers.setdefault(norm, []).append(name)
        pairs = [_Pair(norm, tuple(names), is_norm=True) for norm, names in readers.items()]
        for name in self.largest:
            owner, _, leaf = name.rpartition(".")
            if leaf == "o_proj" and f"{owner}.v_proj" in self.largest:
                attention: Any = self._block.get_submodule(owner)
                heads = len(self.largest[name]) // attention.v_proj.out_features
                pairs.append(_Pair(f"{owner}.v_proj", (name,), shared=(attention.head_dim, heads)))
            elif leaf == "down_proj" and {f"{owner}.gate_proj", f"{owner}.up_proj"} <= self.largest.keys():
                pairs.append(_Pair(f"{owner}.up_proj", (name,)))
            elif leaf == "down_proj" and f"{owner}.gate_up_proj" in self.largest:
                pairs.append(_Pair(f"{owner}.gate_up_proj", (name,), first=len(self.largest[name])))
        return pairs


def _features_last(layer: Any) -> Tensor:
    weight: Tensor = layer.weight
    return weight.T if isinstance(layer, Conv1D) else weight


def _one(module: nn.Module) -> float:
    """The gain of a norm whose weight is 0."""
    return 1.0 if type(module).__name__.startswith("Gemma") else 0.0


def _divided(scales: Tensor, first: int, one: float) -> Change:
    """Output channels, or a norm's gain, divided by scales."""

    def change(tensor: Tensor) -> Tensor:
        ratios = scales if tensor.ndim == 1 else scales[:, None]
        return torch.cat((tensor[:first], (tensor[first:] + one) / ratios - one))

    return change


def _multiplied(scales: Tensor, features_first: bool) -> Change:
    """Input features multiplied by scales."""
    return lambda tensor: tensor * (scales[:, None] if features_first else scales)
