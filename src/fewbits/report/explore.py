"""The data of the explore page: the catalog as it is, what other software does, what is stored in blocks, what fits."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from importlib.resources import files
from typing import Any

from fewbits.formats import Format, Overflow, Rounding, ScaleRule, names
from fewbits.formats.dialects import DIALECTS
from fewbits.formats.precisions import STORED_PRECISIONS, StoredPrecision
from fewbits.measure.plan_bytes import CacheLayer, Matrix, Size, bits_per_weight, cache_bytes, weight_bytes
from fewbits.measure.plan_training import TRAININGS


def page_data() -> dict[str, Any]:
    """All that the page knows, as plain data for JSON.

    A format is its row of fields; the page derives the rest, as `Format` does. The doubles of a codebook are written
    so that they are read back exactly.
    """
    return {
        "formats": [_row(Format.named(name)) for name in names()],
        "dialects": [_dialect(dialect) for dialect in DIALECTS],
        "roundings": [str(rounding) for rounding in Rounding],
        "overflows": [str(overflow) for overflow in Overflow],
        "scale_rules": {name: _scale_rules(name) for name in names() if Format.named(name).block is not None},
        "groups": [asdict(group) for group in GROUPS],
        "precisions": [{"name": stored.name} for stored in STORED_PRECISIONS],
        "trainings": [{"name": training.name, "parts": training.parts} for training in TRAININGS],
        "models": [_model(model) for model in MODELS],
        "gradients": json.loads(files("fewbits.report").joinpath("page/gradients.json").read_text()),
    }


def _row(fmt: Format) -> dict[str, Any]:
    return asdict(fmt) | {"kind": str(fmt.kind), "specials": str(fmt.specials), "aliases": list(fmt.aliases)}


def _dialect(dialect: Any) -> dict[str, Any]:
    return {
        "name": dialect.name,
        "what": dialect.what,
        "seen": dialect.seen,
        "overflow": str(dialect.overflow),
        "formats": {name: str(rule) for name, rule in dialect.formats.items()},
        "notes": dict(dialect.notes),
    }


def _scale_rules(name: str) -> list[str]:
    fmt = Format.named(name)
    default = fmt.scale_rule(None)
    two_level = fmt.block is not None and fmt.block.tensor_scale is not None
    others = (ScaleRule.TWO_LEVEL, ScaleRule.ONE_LEVEL)
    return [str(rule) for rule in ScaleRule if (rule in others) == two_level or rule is default]


@dataclass(frozen=True)
class Group:
    """Integers in groups that share a scale: largest magnitude / `divisor`, rounded up to the scale's format."""

    name: str
    size: int
    scale: str
    divisor: float
    lowest: int


# As `fewbits.tensors.quantized` does it, with the groups of MX blocks so that they can be compared.
GROUPS = (Group("int8", 32, "bf16", 127, -127), Group("int4", 32, "bf16", 7.5, -8))


@dataclass(frozen=True)
class Shape:
    """The shape of a dense decoder; its parameters follow from it, without biases."""

    name: str
    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    tied: bool

    @property
    def size(self) -> Size:
        """Its weights by kind: attention, gated MLP and two norms in each layer, the embedding, the head, a norm."""
        H, F, layers = self.hidden, self.intermediate, self.layers
        queries, keys = self.heads * self.head_dim, self.kv_heads * self.head_dim
        matrices = ((queries, H, 1), (keys, H, 2), (H, queries, 1), (F, H, 2), (H, F, 1))
        norms = (2 * layers + 1) * H
        return Size(
            layers=tuple(Matrix(N, K, layers * count, layers * count) for N, K, count in matrices),
            head=Matrix(self.vocabulary, H),
            tied=self.tied,
            table=self.vocabulary * H,
            rest=norms,
            rest_read=norms,
        )

    @property
    def cache(self) -> CacheLayer:
        """Its keys and values."""
        keys = self.kv_heads * self.head_dim
        return CacheLayer(keys, keys, self.kv_heads, None, self.layers)

    def fit(self, stored: StoredPrecision) -> StoredPrecision:
        """The precision with the largest group size that all layers allow, as `fewbits.models` fits it."""
        if stored.group_size is None:
            return stored
        sizes = [size for size in (stored.group_size, 64, 32) if size <= stored.group_size]
        whole = (size for size in sizes if not any(matrix.K % size for matrix in self.size.layers))
        return replace(stored, group_size=next(whole, sizes[-1]))


def _model(shape: Shape) -> dict[str, Any]:
    """What the page needs of a model: the numbers of `fewbits plan`, in bytes, by precision."""
    fitted = [shape.fit(stored) for stored in STORED_PRECISIONS]
    return {
        "name": shape.name,
        "parameters": shape.size.parameters,
        "bits": {stored.name: bits_per_weight(shape.size, stored) for stored in fitted},
        "weights": {stored.name: weight_bytes(shape.size, stored) for stored in fitted},
        "cache": {stored.name: cache_bytes([shape.cache], 1, stored) for stored in fitted},
        "cache_int8": cache_bytes([shape.cache], 1, fitted[0], int8=True),
    }


MODELS = (
    Shape("SmolLM2-135M", 30, 576, 1536, 9, 3, 64, 49152, True),
    Shape("Llama-3.2-1B", 16, 2048, 8192, 32, 8, 64, 128256, True),
    Shape("ChatGLM3-6B", 28, 4096, 13696, 32, 2, 128, 65024, False),
    Shape("Llama-3.1-8B", 32, 4096, 14336, 32, 8, 128, 128256, False),
    Shape("Qwen2.5-14B", 48, 5120, 13824, 40, 8, 128, 152064, False),
    Shape("Qwen2.5-32B", 64, 5120, 27648, 40, 8, 128, 152064, False),
    Shape("Llama-3.1-70B", 80, 8192, 28672, 64, 8, 128, 128256, False),
    Shape("Llama-3.1-405B", 126, 16384, 53248, 128, 8, 128, 128256, False),
)
