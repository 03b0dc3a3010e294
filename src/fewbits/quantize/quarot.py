"""QuaRot, the part of it that costs nothing: the residual stream and the values rotated by their neighbours' weights.

    embedding R ─┬─ norm ─ (q k v) diag(g) R ─ attention ─ o ─┬─ norm ─ (gate up) diag(g) R ─ … ─ down ─┬─ … ─ head
                 └────────────── h R ──────────────────── R ──┴───────────────── h R ────────────── R ──┘

RMSNorm divides by a length, which an orthogonal R keeps; so all that lives between the layers, h, may be h R, if each
layer that reads it takes the norm's gain g and Rᵀ into its weights, and each that writes it R. A large channel is
spread over all channels then, and 8 bits round it as well as the others. Values take a rotation of each head from v to
o. What lies before the down projection, act(gate) · up, is no place for it, as it is a product. But it can be scaled:
rows of up are divided, and columns of down multiplied, by what makes both of like size, with the rows' lengths for what
activations will be. That needs no text; ``smoothquant`` does better with one.

A tied output head cannot stay tied, as the embedding has no gain: it becomes a tensor of its own.
Source: Ashkboos et al., "QuaRot" (arXiv 2404.00456), sections 4.1 to 4.3; Liu et al., "SpinQuant" (arXiv 2405.16406).

Letters: V vocabulary, H hidden features, D channels of a head, N output channels, K input features.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
import transformers
from torch import Tensor, nn

from fewbits.errors import FewbitsError
from fewbits.models.naming import Place
from fewbits.models.quantizable import output_head
from fewbits.models.source import Source
from fewbits.quantize.folding import Change, FoldedSource, Folds, foldable, scales_of, together

NAME = "quarot"
_CHUNK = 1 << 22  # elements in float64 at once
_SEED = 0


@dataclass(frozen=True)
class _Family:
    """How a decoder of the Llama kind names what reads the residual stream; all write it by o_proj and down_proj.

    Attributes:
        mlp: The layers behind the second norm.
        one: The gain of a norm whose weight is 0.
    """

    mlp: tuple[str, ...] = ("mlp.gate_proj", "mlp.up_proj")
    one: float = 0.0


_FAMILIES = {
    "llama": _Family(),
    "mistral": _Family(),
    "qwen2": _Family(),
    "qwen3": _Family(),
    "glm": _Family(mlp=("mlp.gate_up_proj",)),
    "gemma": _Family(one=1.0),
}
_ROTATED = r"re:.*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|gate_up_proj)$"
_ATTENTION = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
_WRITERS = ("self_attn.o_proj", "mlp.down_proj")


class Rotation:
    """A fixed orthogonal matrix R of n features: diag(±1) · (H ⊗ C), an entry of which is about 1/√n.

    H is Sylvester's Hadamard matrix of the largest power of two that divides n, C the cosine transform (DCT-II) of what
    is left, 9 for n = 576: there is no Hadamard matrix of most sizes, and cosines mix all features as well.
    """

    def __init__(self, n: int) -> None:
        self.n = n
        self.odd = n // (n & -n)
        generator = torch.Generator().manual_seed(_SEED)
        self._signs = torch.randint(0, 2, (n,), generator=generator).double() * 2 - 1

    @cached_property
    def _cosines(self) -> Tensor:
        m = self.odd
        rows, columns = torch.arange(m, dtype=torch.float64)[:, None], torch.arange(m, dtype=torch.float64)
        matrix = torch.cos(math.pi / m * (rows + 0.5) * columns) * math.sqrt(2 / m)
        matrix[:, 0] /= math.sqrt(2)
        return matrix

    def __call__(self, x: Tensor) -> Tensor:
        """Give ``x R`` of float32 ``[..., n]``, computed in float64 and rounded once."""
        out = torch.empty_like(x)
        rows, results = x.reshape(-1, self.n), out.view(-1, self.n)
        step = max(1, _CHUNK // self.n)
        for start in range(0, len(rows), step):
            results[start : start + step] = self._apply(rows[start : start + step].double())
        return out

    def _apply(self, x: Tensor) -> Tensor:
        power = self.n // self.odd
        y, distance = (x * self._signs).view(-1, power, self.odd), 1
        while distance < power:
            first, second = y.view(len(x), power // (2 * distance), 2, distance, self.odd).unbind(2)
            y, distance = torch.stack((first + second, first - second), 2).view(len(x), power, self.odd), 2 * distance
        return (y / math.sqrt(power) @ self._cosines).view(len(x), self.n)


def quarot(source: Source) -> FoldedSource:
    """Fold norms and rotations into the weights of a model; nothing is computed before a tensor is read.

    Raises:
        FewbitsError: If the model is not one for which that is exact; the message names what it is instead.
    """
    model, places = foldable(source, NAME)
    return FoldedSource(source, _Folding(source, model, places, _family_of(model)).folds())


class _Folding:
    """What becomes of each tensor of one model."""

    def __init__(
        self, source: Source, model: transformers.PreTrainedModel, places: dict[str, Place], family: _Family
    ) -> None:
        config = model.config
        self._source, self._model, self._family = source, model, family
        self._stored = {place.parameter: name for name, place in places.items()}
        self._layers = config.num_hidden_layers
        self._head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        self._of_stream, self._of_head = Rotation(config.hidden_size), Rotation(self._head_dim)
        self._changes: dict[str, Change] = {}

    def folds(self) -> Folds:
        """All of it."""
        for index in range(self._layers):
            self._fold_layer(f"model.layers.{index}.")
        self._change("model.embed_tokens.weight", self._of_stream)
        self._change("model.norm.weight", self._no_gain)
        head = output_head(self._model)
        assert head is not None, type(self._model)
        tied = head in self._model.all_tied_weights_keys
        name = "lm_head.weight" if tied else self._stored[head]
        self._changes[name] = together(self._with_gain("model.norm"), self._of_stream)
        if not tied:
            return Folds(self._changes, rotated=(_ROTATED,))
        reason = f"a tensor of its own, as {NAME} unties it from the embedding"
        copies = {name: self._stored["model.embed_tokens.weight"]}
        return Folds(self._changes, copies, {name: reason}, {"tie_word_embeddings": False}, (_ROTATED,))

    def _fold_layer(self, path: str) -> None:
        for norm, readers in (("input_layernorm", _ATTENTION), ("post_attention_layernorm", self._family.mlp)):
            for reader in readers:
                self._change(f"{path}{reader}.weight", self._with_gain(f"{path}{norm}"), self._of_stream)
            self._change(f"{path}{norm}.weight", self._no_gain)
        self._change(f"{path}self_attn.v_proj.weight", _on_outputs(self._each_head))
        self._change(f"{path}self_attn.v_proj.bias", self._each_head)
        self._change(f"{path}self_attn.o_proj.weight", self._each_head)
        self._balance(path)
        for writer in _WRITERS:
            self._change(f"{path}{writer}.weight", _on_outputs(self._of_stream))
            self._change(f"{path}{writer}.bias", self._of_stream)

    def _balance(self, path: str) -> None:
        """Divide what down_proj is given, where that costs its weights as much as it gains."""
        scales: list[Tensor] = []

        def given() -> Tensor:
            if not scales:  # kept: three weights are read for them
                norm = self._with_gain(f"{path}post_attention_layernorm")
                read = [norm(self._read(f"{path}{name}.weight")) for name in self._family.mlp]
                gate, up = torch.cat(read).norm(dim=1).chunk(2)
                scales.append(scales_of(gate * up, self._read(f"{path}mlp.down_proj.weight").norm(dim=0)))
            return scales[0]

        def divided(weight: Tensor) -> Tensor:
            kept = len(weight) - len(given())  # rows of gate, where both are one tensor
            return torch.cat((weight[:kept], weight[kept:] / given().view(-1, *[1] * (weight.ndim - 1))))

        up = f"{path}{self._family.mlp[-1]}"
        self._change(f"{up}.weight", divided)
        self._change(f"{up}.bias", divided)
        self._change(f"{path}mlp.down_proj.weight", lambda weight: weight * given())

    def _read(self, parameter: str) -> Tensor:
        return self._source.read(self._stored[parameter]).float()

    def _change(self, parameter: str, *changes: Change) -> None:
        """Add changes to a tensor, behind those that it has; one that the model does not have has none."""
        if parameter in self._stored:
            name = self._stored[parameter]
            before = (self._changes[name],) if name in self._changes else ()
            self._changes[name] = together(*before, *changes)

    def _with_gain(self, norm: str) -> Change:
        return lambda weight: weight * (self._read(f"{norm}.weight") + self._family.one)

    def _no_gain(self, weight: Tensor) -> Tensor:
        return torch.full_like(weight, 1.0 - self._family.one)

    def _each_head(self, x: Tensor) -> Tensor:
        """Rotate the channels of every head, which follow one another in the last dimension."""
        return self._of_head(x.view(*x.shape[:-1], -1, self._head_dim)).view(x.shape)


def _on_outputs(rotate: Callable[[Tensor], Tensor]) -> Change:
    """A rotation of what a layer gives instead of what it is given."""
    return lambda weight: rotate(weight.T.contiguous()).T.contiguous()


def _family_of(model: transformers.PreTrainedModel) -> _Family:
    kind, name = model.config.model_type, type(model).__name__
    if kind in _FAMILIES and name.endswith("ForCausalLM"):
        return _FAMILIES[kind]
    known = ", ".join(_FAMILIES)
    if any(isinstance(module, nn.LayerNorm) for module in model.modules()):
        why = "its LayerNorm subtracts a mean, which a rotation does not keep"
    elif not name.endswith("ForCausalLM"):
        why = "it has not the output head of a language model"
    else:
        why = f"it is exact for language models of the kinds {known}, and this one is of the kind {kind!r}"
    raise FewbitsError(f"method={NAME!r}: {name} cannot be rotated by its weights: {why}; use gptq or mse without it")
