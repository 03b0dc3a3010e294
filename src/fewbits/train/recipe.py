"""Recipes: which format each kind of number takes in training, as frozen data.

    fp32   nothing is rounded: the baseline
    fp16   operands and results of matmuls in fp16, the loss scaled so that small gradients survive
    bf16   the same in bf16, whose range is that of fp32: no loss scaling
    fp8    operands in 8 bits, e4m3fn forward and e5m2 for gradients, each tensor scaled; results in bf16

A recipe of your own is a change of fields: ``dataclasses.replace(Recipe.named("bf16"), master="split", state="bf16")``.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass, fields
from typing import Any

from fewbits.errors import FewbitsError
from fewbits.formats import Format, Kind

MASTERS = ("fp32", "split", "kahan", "stochastic")
STATES = ("fp32", "bf16", "8bit")
SCALINGS = ("tensor", "delayed", "row", "block")
RESULTS = ("fp32", "bf16", "fp16")


@dataclass(frozen=True)
class LossScaling:
    """How the loss scale moves; see ``fewbits.train.loss_scale``. All scales are powers of two.

    Attributes:
        initial: The first scale; with ``dynamic=False`` the only one.
        dynamic: Whether the scale follows the gradients.
        floor: The least scale.
        cap: The largest scale.
        headroom: The largest scaled gradient is kept this many times below the largest number of its format.
        patience: Clean steps before the scale grows: the recovery time.
        hysteresis: Overflows in a row before the scale is lowered; the steps are skipped all the same.
        memory: Clean steps before a scale that overflowed is tried again.
    """

    initial: float = 2.0**16
    dynamic: bool = True
    floor: float = 1.0
    cap: float = 2.0**24
    headroom: float = 8.0
    patience: int = 8
    hysteresis: int = 1
    memory: int = 500

    def __post_init__(self) -> None:
        for name in ("initial", "floor", "cap", "headroom"):
            value = getattr(self, name)
            if not isinstance(value, int | float) or not _is_power_of_two(float(value)):
                raise FewbitsError(f"loss scaling: {name}={value!r}; a power of two from 2^-100 to 2^100 is needed")
        if not self.floor <= self.initial <= self.cap:
            raise FewbitsError(
                f"loss scaling: initial={self.initial:g} is outside floor={self.floor:g} … cap={self.cap:g}"
            )
        for name in ("patience", "hysteresis", "memory"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise FewbitsError(f"loss scaling: {name}={value!r}; a whole number from 1 is needed")


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Formats of a training run. Fields that are formats take names too.

    Attributes:
        name: What it is called in messages and state dicts.
        weights: Of the weights as matmuls read them.
        activations: Of the activations as matmuls read them.
        gradients: Of the gradients as the matmuls of the backward pass read them.
        results: What a matmul's sum is rounded to, once: fp32, bf16 or fp16; also that of weight gradients.
        accumulation: Of the sums inside a matmul: fp32.
        master: How the weights are kept: fp32; split (bf16 and 16 more bits, the same number exactly); kahan (bf16
            and what rounding lost); stochastic (bf16, rounded up or down at random).
        state: Of the optimizer's moments: fp32, bf16, 8bit (256 share a scale).
        loss_scaling: None leaves the loss as it is.
        scaling: How 8-bit operands get their scales: tensor (its largest magnitude now), delayed (that of the last
            ``history`` steps), row (each row of the matmul), block (1×128; weights 128×128). None without 8-bit ones.
        history: Steps that delayed scaling looks back.
        keep: Patterns of module names, as in ``*.lm_head``, whose matmuls stay in the format ``kept``.
        kept: The format of operands and results of those: fp32, bf16 or fp16.
        seed: Of stochastic rounding.
    """

    name: str
    weights: Format = "fp32"  # type: ignore[assignment]  # names become formats in __post_init__
    activations: Format = "fp32"  # type: ignore[assignment]
    gradients: Format = "fp32"  # type: ignore[assignment]
    results: Format = "fp32"  # type: ignore[assignment]
    accumulation: Format = "fp32"  # type: ignore[assignment]
    master: str = "fp32"
    state: str = "fp32"
    loss_scaling: LossScaling | None = None
    scaling: str | None = None
    history: int = 16
    keep: tuple[str, ...] = ()
    kept: Format = "fp32"  # type: ignore[assignment]
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("weights", "activations", "gradients", "results", "accumulation", "kept"):
            object.__setattr__(self, name, Format.named(getattr(self, name)))
        object.__setattr__(self, "keep", tuple(self.keep))
        self._check_formats()
        _one_of(self, "master", MASTERS)
        _one_of(self, "state", STATES)
        if self.master != "fp32" and self.results.name != "bf16":
            raise FewbitsError(
                f"recipe {self.name}: master={self.master!r} keeps weights in bf16, but results={self.results.name}; "
                "take results='bf16' or master='fp32'"
            )
        if self.history < 1:
            raise FewbitsError(f"recipe {self.name}: history={self.history}; at least 1 step is needed")
        if not 0 <= self.seed < 1 << 32:
            raise FewbitsError(f"recipe {self.name}: seed={self.seed} is out of range: take 0 to 2^32 - 1")

    def _check_formats(self) -> None:
        for name in ("results", "kept"):
            if getattr(self, name).name not in RESULTS:
                raise FewbitsError(
                    f"recipe {self.name}: {name}={getattr(self, name).name}; one of {', '.join(RESULTS)} is needed"
                )
        if self.accumulation.name != "fp32":
            raise FewbitsError(
                f"recipe {self.name}: accumulation={self.accumulation.name}; matmuls add up in fp32 only"
            )
        for name in ("weights", "activations", "gradients"):
            fmt = getattr(self, name)
            if fmt.name != self.results.name and not is_eight_bit(fmt):
                raise FewbitsError(
                    f"recipe {self.name}: {name}={fmt.name} with results={self.results.name}; operands are in the "
                    "format of the results, or floats of 8 bits without blocks"
                )
        if self.eight_bit and self.results.name == "fp16":
            raise FewbitsError(
                f"recipe {self.name}: 8-bit operands have scales beyond the range of results=fp16; take bf16 or fp32"
            )
        if self.eight_bit and self.scaling not in SCALINGS:
            raise FewbitsError(
                f"recipe {self.name}: scaling={self.scaling!r}; 8-bit operands need one of {', '.join(SCALINGS)}"
            )
        if not self.eight_bit and self.scaling is not None:
            raise FewbitsError(
                f"recipe {self.name}: scaling={self.scaling!r} is for 8-bit operands; this recipe has none, take None"
            )

    @property
    def eight_bit(self) -> bool:
        """Whether any operand of a matmul has 8 bits."""
        return any(is_eight_bit(fmt) for fmt in (self.weights, self.activations, self.gradients))

    @classmethod
    def named(cls, name: str | Recipe) -> Recipe:
        """Find a recipe by name; a ``Recipe`` is returned as it is.

        Raises:
            FewbitsError: No such recipe; the message suggests the nearest name.
        """
        if isinstance(name, Recipe):
            return name
        if isinstance(name, str) and name in RECIPES:
            return RECIPES[name]
        near = difflib.get_close_matches(str(name).lower(), RECIPES, n=1, cutoff=0.4)
        hint = f"did you mean {near[0]}? " if near else ""
        raise FewbitsError(f"recipe {name!r} is unknown; {hint}known: {', '.join(RECIPES)}")

    def to_json(self) -> dict[str, Any]:
        """All fields as plain data, to compare and to store."""
        found: dict[str, Any] = {}
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, LossScaling):
                value = {inner.name: getattr(value, inner.name) for inner in fields(value)}
            found[field.name] = value.name if isinstance(value, Format) else value
        found["keep"] = list(self.keep)
        return found


def is_eight_bit(fmt: Format) -> bool:
    """Whether it is a float format of 8 bits that a tensor can take with one scale."""
    return fmt.bits == 8 and fmt.kind is Kind.FLOAT and fmt.block is None and fmt.has_subnormals and fmt.signed


def _is_power_of_two(value: float) -> bool:
    return 2.0**-100 <= value <= 2.0**100 and value.hex().startswith("0x1.0000000000000p")


def _one_of(recipe: Recipe, field: str, choices: tuple[str, ...]) -> None:
    value = getattr(recipe, field)
    if value not in choices:
        raise FewbitsError(f"recipe {recipe.name}: {field}={value!r}; one of {', '.join(choices)} is needed")


def _sixteen(name: str, loss_scaling: LossScaling | None) -> Recipe:
    return Recipe(name=name, weights=name, activations=name, gradients=name, results=name, loss_scaling=loss_scaling)  # type: ignore[arg-type]


RECIPES = {
    recipe.name: recipe
    for recipe in (
        Recipe(name="fp32"),
        _sixteen("fp16", LossScaling()),
        _sixteen("bf16", None),
        Recipe(
            name="fp8",
            weights=Format.named("e4m3fn"),
            activations=Format.named("e4m3fn"),
            gradients=Format.named("e5m2"),
            results=Format.named("bf16"),
            scaling="tensor",
            kept=Format.named("bf16"),
        ),
    )
}
