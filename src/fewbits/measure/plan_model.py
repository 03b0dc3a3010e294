"""What a model consists of, found on the meta device: its weights by kind, its cache, what a token reads.

Letters: E experts, N output channels, K input features.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
import transformers
from torch import nn

from fewbits.formats.precisions import STORED_PRECISIONS, StoredPrecision
from fewbits.measure.plan_bytes import CacheLayer, Matrix, Size
from fewbits.measure.plan_cache import cache_layers, decoder_of, depth_of
from fewbits.measure.plan_config import Configuration
from fewbits.models.architecture import auto_class_of, empty_model
from fewbits.models.generate import context_length
from fewbits.models.int8_cache import has_cache
from fewbits.models.manifest import fitted, make_manifest
from fewbits.models.naming import Place
from fewbits.models.precision import TORCH_DTYPES, Precision
from fewbits.models.quantizable import experts_left_out, output_head, quantizable_weights

_ACTIVE = ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k", "top_k_experts", "num_selected_experts")
"""What families call the number of experts that work on a token."""


@dataclass(frozen=True)
class Outline:
    """A model without weights, and what can be said of it."""

    configuration: Configuration
    model: transformers.PreTrainedModel

    @classmethod
    def of(cls, configuration: Configuration) -> Outline:
        """Build the model on the meta device.

        Raises:
            FewbitsError: transformers cannot.
        """
        config = configuration.config
        return cls(configuration, empty_model(config, torch.bfloat16, auto_class_of(config)))

    @property
    def architecture(self) -> str:
        """The class of the model."""
        return type(self.model).__name__

    @property
    def kept_dtype(self) -> torch.dtype:
        """The dtype of what a checkpoint does not quantize."""
        dtype = self.configuration.config.dtype
        return dtype if dtype in TORCH_DTYPES.values() else torch.bfloat16

    @cached_property
    def limit(self) -> int | None:
        """Tokens that the model sees at most; None where its configuration does not say."""
        return context_length(self.model.config)

    @cached_property
    def layers(self) -> int:
        """Layers that a written token passes."""
        return depth_of(self.model.config)

    @cached_property
    def writes(self) -> bool:
        """Whether it writes text token by token."""
        return has_cache(self.model) and bool(self.model.can_generate())

    @cached_property
    def writes_otherwise(self) -> bool:
        """Whether it writes text with another state than keys and values."""
        return not has_cache(self.model) and bool(self.model.can_generate())

    @cached_property
    def hidden(self) -> int:
        """Channels between layers."""
        return int(getattr(decoder_of(self.model.config), "hidden_size", 0) or 0)

    @cached_property
    def widest(self) -> int:
        """The most input features that a layer has: as a rule the width inside its MLP."""
        return max((weight.K for weight in quantizable_weights(self.model).values()), default=self.hidden)

    @cached_property
    def spread(self) -> int:
        """Input and output features of all layers that a token passes, added up; the head's left out."""
        head, active = output_head(self.model), self.active_experts
        weights = [weight for weight in quantizable_weights(self.model).values() if weight.parameter != head]
        return sum((weight.N + weight.K) * ((active or 1) if weight.kind == "experts" else 1) for weight in weights)

    @cached_property
    def outputs(self) -> int:
        """What the output head gives for a token: the vocabulary."""
        head = self.model.get_output_embeddings()
        return int(head.weight.shape[0]) if head is not None else 0

    def fit(self, precision: Precision) -> StoredPrecision:
        """A precision as plain data, its groups fitted to the model."""
        whole = precision.cast or self.configuration.schemes is not None
        fits = precision if whole else fitted(self.model, precision)
        plain = next(stored for stored in STORED_PRECISIONS if stored.name == precision.name)
        return StoredPrecision(plain.name, plain.weights, plain.activations, fits.group_size, plain.cast, plain.summary)

    @cached_property
    def stored(self) -> Precision | None:
        """What most layers of a checkpoint that is quantized already are; None if its tensors are plain values."""
        counts: Counter[Precision] = Counter()
        for weight in quantizable_weights(self.model).values():
            precision = self.configuration.stored_as(weight.module)
            if precision is not None:
                counts[precision] += weight.N * weight.K
        return max(counts, key=lambda precision: counts[precision], default=None)

    def size(self, precision: Precision) -> Size:
        """The weights by what becomes of them in a precision, as loading decides it.

        Raises:
            FewbitsError: No layer can take the precision.
        """
        return _Sizing(self, precision).size()

    @cached_property
    def cache(self) -> tuple[CacheLayer, ...]:
        """The keys and values that it keeps; empty if it keeps none."""
        return cache_layers(self.model.config) if has_cache(self.model) else ()

    @property
    def active_experts(self) -> int | None:
        """Experts that work on a token; None without experts, or where the configuration does not say."""
        config = decoder_of(self.model.config)
        for name in _ACTIVE:
            count = getattr(config, name, None)
            count = max(count) if isinstance(count, (list, tuple)) and count else count
            if isinstance(count, int) and count > 0:
                return count
        return None


class _Sizing:
    """The weights of a model in one precision."""

    def __init__(self, outline: Outline, precision: Precision) -> None:
        self.outline, self.model = outline, outline.model
        tied = self.model.all_tied_weights_keys  # on the meta device they are tensors of their own
        every = dict(self.model.named_parameters(remove_duplicate=False))
        self.parameters = {name: each for name, each in every.items() if name not in tied}
        self.weights = quantizable_weights(self.model)
        self.head = output_head(self.model)
        self.tied = self.head is not None and self.head in tied
        self.head_shape = tuple(every[self.head].shape) if self.head is not None else None
        self.quantized = self._chosen(precision)
        self.wide = _kept_wide(self.model, precision)

    def _chosen(self, precision: Precision) -> list[str]:
        """Names of the weights that take the precision; of a cast, of all that a quantized layer could take."""
        if precision.cast:
            return [name for name in self.weights if name != self.head]
        configuration = self.outline.configuration
        if configuration.schemes is not None:
            names = [name for name, weight in self.weights.items() if name != self.head]
            return [name for name in names if configuration.stored_as(self.weights[name].module) is not None]
        shapes = {name: tuple(tensor.shape) for name, tensor in self.model.state_dict().items()}
        places = {name: Place(name, None, None) for name in shapes}
        rows = make_manifest(self.model, shapes, places, fitted(self.model, precision), dtype=self.outline.kept_dtype)
        return [row.tensor for row in rows if row.reason is None]

    def size(self) -> Size:
        """Every parameter, once."""
        taken = {*self.quantized} | ({self.head} if self.head is not None and not self.tied else set())
        table = self._table() - taken
        left = {name: each for name, each in self.parameters.items() if name not in taken | table}
        return Size(
            layers=tuple(self._matrices()),
            head=None if self.head_shape is None else Matrix(self.head_shape[0], self.head_shape[1]),
            tied=self.tied,
            table=sum(self.parameters[name].numel() for name in table),
            rest=sum(each.numel() for each in left.values()),
            rest_read=sum(int(each.numel() * self._share(name)) for name, each in left.items()),
            wide=sum(each.numel() for name, each in self.parameters.items() if self.wide(name, each)),
            buffers=sum(buffer.nbytes for buffer in self.model.buffers() if not buffer.is_meta),
        )

    def _table(self) -> set[str]:
        """The name of the input embedding, or of what it is tied to."""
        embedding = self.model.get_input_embeddings()
        if not isinstance(embedding, nn.Embedding):
            return set()
        name = next(f"{name}.weight" for name, module in self.model.named_modules() if module is embedding)
        return {self.model.all_tied_weights_keys.get(name, name)}

    def _matrices(self) -> list[Matrix]:
        """The quantized weights, equal ones together."""
        counts: Counter[tuple[int, int, bool, int, StoredPrecision | None]] = Counter()
        for name in self.quantized:
            weight = self.weights[name]
            experts = self.parameters[name].shape[0] if weight.kind == "experts" else 0
            counts[weight.N, weight.K, self._is_read(name), experts, self._own(weight.module)] += 1
        active = self.outline.active_experts
        return [
            Matrix(N, K, count * max(E, 1), count * min(active or E, E) if E and read else count * read, own)
            for (N, K, read, E, own), count in counts.items()
        ]

    def _own(self, module: str) -> StoredPrecision | None:
        """The precision that a checkpoint stores this layer in, where it is quantized already."""
        precision = self.outline.configuration.stored_as(module)
        return None if precision is None else self.outline.fit(precision)

    def _is_read(self, name: str) -> bool:
        """Whether a written token passes it: not what has read the input of an encoder-decoder."""
        return not (self.model.config.is_encoder_decoder and ".encoder." in f".{name}")

    def _share(self, name: str) -> float:
        """The part of a weight in float that a written token reads."""
        owner = name.rpartition(".")[0]
        if not self._is_read(name) or isinstance(self.model.get_submodule(owner), nn.Embedding):
            return 0.0
        if owner in experts_left_out(self.model):
            E = self.parameters[name].shape[0]
            return float(min(self.outline.active_experts or E, E) / E)
        return 1.0


def _kept_wide(model: transformers.PreTrainedModel, precision: Precision) -> Callable[[str, torch.Tensor], bool]:
    """Which parameters of a model in bfloat16 stay in float32 where it is cast: its class or a layer says so."""
    names = {*(getattr(model, "_keep_in_fp32_modules_strict", None) or ())}
    if precision.name == "fp16":
        names |= {*(getattr(model, "_keep_in_fp32_modules", None) or ())}
    pattern = "|".join(rf"(?:^|\.){re.escape(name)}(?:$|\.)" for name in names)
    named = re.compile(pattern or r"(?!)")
    return lambda name, tensor: tensor.dtype == torch.float32 or named.search(name) is not None
