"""The data of the explore page: the catalog as it is, what other software does, what is stored in blocks, what fits."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from importlib.resources import files
from typing import Any

from fewbits.formats import Format, Overflow, Rounding, ScaleRule, names
from fewbits.formats.dialects import DIALECTS


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
        "precisions": [asdict(precision) for precision in STORED],
        "trainings": [asdict(training) for training in TRAININGS],
        "models": [asdict(model) | {"parameters": model.parameters} for model in MODELS],
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
class Stored:
    """What a precision stores for a weight.

    Attributes:
        name: as in `fewbits convert --to`.
        weights: the format of the codes.
        group_size: weights that share a 16-bit scale; None: a whole output channel, which is next to nothing.
        cast: whether the embedding and the output head take the format too, or stay in 16 bits.
    """

    name: str
    weights: str
    group_size: int | None
    cast: bool


STORED = (
    Stored("fp32", "fp32", None, True),
    Stored("bf16", "bf16", None, True),
    Stored("fp16", "fp16", None, True),
    Stored("int8", "int8", None, False),
    Stored("int8-weight", "int8", 128, False),
    Stored("fp8", "e4m3fn", None, False),
    Stored("int4", "int4", 128, False),
    Stored("nf4", "nf4", 64, False),
)


@dataclass(frozen=True)
class Training:
    """Bytes of training for each parameter, without activations: what is stored, and how many bytes it takes."""

    name: str
    parts: tuple[tuple[str, float], ...]


_ADAM = ("two moments, fp32", 8.0)
TRAININGS = (
    Training("fp32", (("weights, fp32", 4), ("gradients, fp32", 4), _ADAM)),
    Training("fp16 or bf16", (("weights, fp32", 4), ("16-bit copy", 2), ("gradients, fp32", 4), _ADAM)),
    Training("fp8", (("weights, fp32", 4), ("8-bit copy", 1), ("gradients, fp32", 4), _ADAM)),
    Training(
        "bf16, split weights, bf16 moments",
        (("weights, bf16", 2), ("their 16 low bits", 2), ("gradients, bf16", 2), ("two moments, bf16", 4)),
    ),
    Training(
        "bf16, stochastic weights, 8-bit moments",
        (("weights, bf16", 2), ("gradients, bf16", 2), ("two moments, 8 bits and a scale per 256", 2 + 2 * 4 / 256)),
    ),
)


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
    def embedding(self) -> int:
        """Parameters of the embedding and, where it is not the same, the output head."""
        return self.vocabulary * self.hidden * (1 if self.tied else 2)

    @property
    def parameters(self) -> int:
        """All parameters: the embedding, for each layer attention, gated MLP and two norms, and the last norm."""
        attention = 2 * self.hidden * self.head_dim * (self.heads + self.kv_heads)
        layer = attention + 3 * self.hidden * self.intermediate + 2 * self.hidden
        return self.embedding + self.layers * layer + self.hidden


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
