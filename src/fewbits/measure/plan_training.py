"""What training keeps for each parameter: masters, a low-precision copy, gradients, optimizer state.

Beside AdamW, in the storages of ``fewbits.train``; the figures are those of ``train/storage.py``, and tests hold them
against what a step really keeps.
"""

from __future__ import annotations

from dataclasses import dataclass

from fewbits.train.recipe import RECIPES, Recipe

_STATE_BLOCK = 256  # numbers of an 8-bit moment that share a float32 scale: train/storage.py, which needs torch
_MASTER = {"fp32": 4.0, "split": 4.0, "kahan": 4.0, "stochastic": 2.0}
_MOMENTS = {"fp32": 8.0, "bf16": 4.0, "8bit": 2 * (1 + 4 / _STATE_BLOCK)}


@dataclass(frozen=True)
class Training:
    """A recipe and how its weights and moments are kept.

    Attributes:
        recipe: Its name.
        master: As ``Recipe.master``.
        state: As ``Recipe.state``.
    """

    recipe: str
    master: str = "fp32"
    state: str = "fp32"

    @property
    def name(self) -> str:
        """What to call it: ``bf16, split weights, bf16 state``."""
        master = "" if self.master == "fp32" else f", {self.master} weights"
        return self.recipe + master + ("" if self.state == "fp32" else f", {self.state.replace('8b', '8-b')} state")

    @property
    def computed_bytes(self) -> float:
        """Bytes of a number between matmuls."""
        return self._recipe.results.bits / 8

    @property
    def parts(self) -> tuple[tuple[str, float], ...]:
        """Bytes that a parameter of a linear layer takes, by what they are for."""
        wide, results = self.master == "fp32", self.computed_bytes
        needs_copy = self._recipe.weights.name != ("fp32" if wide else "bf16")
        copy = results if needs_copy else 0.0  # 8-bit operands are kept in the format of the results
        gradient = results if wide else 2.0
        return (
            ("weights", _MASTER[self.master]),
            ("low-precision copy", copy),
            ("gradients", gradient),
            ("optimizer state", _MOMENTS[self.state]),
        )

    @property
    def other_parts(self) -> tuple[tuple[str, float], ...]:
        """The same of an embedding that is not the output head: no matmul reads it."""
        parts = dict(self.parts)
        return tuple({**parts, "low-precision copy": 0.0, "gradients": 4.0 if self.master == "fp32" else 2.0}.items())

    @property
    def bytes_per_parameter(self) -> float:
        """Of a linear layer's, all parts together."""
        return sum(nbytes for _, nbytes in self.parts)

    @property
    def _recipe(self) -> Recipe:
        return RECIPES[self.recipe]

    def command(self, model: str) -> str:
        """What to run, or in Python what to write, to train so."""
        if (self.master, self.state) == ("fp32", "fp32"):
            return f"fewbits train {model} --text my.txt --precision {self.recipe} --steps 100 --out tuned"
        recipe = f'replace(Recipe.named("{self.recipe}"), master="{self.master}", state="{self.state}")'
        return f"fewbits.MixedPrecision(model, optimizer, {recipe})"


VECTOR_PARTS = (("weights", 4.0), ("low-precision copy", 0.0), ("gradients", 4.0), ("optimizer state", 8.0))
"""Bytes of a norm's or bias's parameter: small tensors stay in float32 with every storage."""

TRAININGS = (
    Training("fp32"),
    Training("fp16"),
    Training("bf16"),
    Training("fp8"),
    Training("bf16", "split"),
    Training("bf16", "split", "bf16"),
    Training("bf16", "stochastic", "8bit"),
)
