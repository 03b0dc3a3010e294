"""What a training run is asked for, as frozen data; a resumed run must be asked for the same."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from fewbits.errors import FewbitsError
from fewbits.models.precision import precision_named
from fewbits.train.recipe import Recipe

FULL_LR, ADAPTER_LR = 5e-5, 2e-4
"""Peak learning rates where none is given: the usual ones of fine-tuning all weights, and of low-rank adapters."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """One training run.

    Attributes:
        model: Hub id, folder or ``.gguf`` file.
        text: Path of a UTF-8 file.
        precision: Name of a recipe.
        steps: Optimizer steps, skipped ones included.
        batch: Windows in a forward pass.
        length: Tokens in a window.
        accumulate: Forward passes in a step.
        lr: Peak learning rate; None: 5e-5, or 2e-4 with adapters.
        seed: Of the order of windows, of new weights, of dropout and of stochastic rounding.
        lora: Rank of adapters on a frozen base; None: all weights are trained.
        base_precision: Of the frozen base; None: as it is stored.
        save_every: Steps between checkpoints; None: a tenth of all.

    Raises:
        FewbitsError: A number out of range, an unknown precision, ``base_precision`` without ``lora``.
    """

    model: str
    text: str
    precision: str = "bf16"
    steps: int = 100
    batch: int = 4
    length: int = 256
    accumulate: int = 1
    lr: float | None = None
    seed: int = 0
    lora: int | None = None
    base_precision: str | None = None
    save_every: int | None = None

    def __post_init__(self) -> None:
        least = {"steps": 1, "batch": 1, "length": 2, "accumulate": 1, "lora": 1, "save_every": 1, "seed": 0}
        for name, limit in least.items():
            value = getattr(self, name)
            optional = name in ("lora", "save_every")
            if not (optional and value is None) and (not isinstance(value, int) or value < limit):
                raise FewbitsError(f"{_option(name)} is {value!r}: a whole number from {limit} is needed")
        if self.lr is not None and not 0 < self.lr < math.inf:
            raise FewbitsError(f"--lr is {self.lr!r}: a positive number is needed, such as {FULL_LR:g}")
        self.recipe()
        if self.base_precision is not None:
            precision_named(self.base_precision)
            if self.lora is None:
                raise FewbitsError(
                    f"--base-precision {self.base_precision} is of a frozen base under adapters; give --lora 16 too, "
                    "or leave it out: all weights are trained from FP32 masters"
                )

    def recipe(self) -> Recipe:
        """The recipe of that name, with this seed."""
        return replace(Recipe.named(self.precision), seed=self.seed)

    @property
    def peak_lr(self) -> float:
        """The largest learning rate."""
        return self.lr or (FULL_LR if self.lora is None else ADAPTER_LR)

    @property
    def saves(self) -> int:
        """Steps between checkpoints."""
        return self.save_every or max(1, -(-self.steps // 10))

    def in_fp32(self) -> Settings:
        """The same run with nothing rounded, to compare with."""
        return replace(self, precision="fp32", base_precision=None if self.lora is None else "fp32")

    def to_json(self) -> dict[str, Any]:
        """All fields as plain data."""
        return asdict(self)

    def check_same(self, saved: dict[str, Any]) -> None:
        """See that a checkpoint was made with the same settings; how often is saved may differ.

        Raises:
            FewbitsError: If not.
        """
        for field in fields(self):
            then, now = saved.get(field.name), getattr(self, field.name)
            if field.name not in ("save_every", "text") and then != now:
                raise FewbitsError(
                    f"--resume: the checkpoint was made with {_shown(field.name, then)}, but now it is "
                    f"{_shown(field.name, now)}; give the same, or --overwrite without --resume to begin anew"
                )


def _option(name: str) -> str:
    return "the model" if name == "model" else f"--{name.replace('_', '-')}"


def _shown(name: str, value: Any) -> str:
    return f"no {_option(name)}" if value is None else f"{_option(name)} {value}"
