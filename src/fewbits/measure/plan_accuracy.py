"""What a precision costs in accuracy, as a class: measured on one small model, and named so.

The figures are those of docs/quantization.md, KL divergence from the same model in FP32, in nats per token, on
SmolLM2-135M-Instruct over 8 × 512 tokens. A model of billions of parameters loses less, as a rule; the order of the
precisions is what carries over.
"""

from __future__ import annotations

from dataclasses import dataclass

SOURCE = "SmolLM2-135M-Instruct, docs/quantization.md"

NEGLIGIBLE, SLIGHT = 0.005, 0.05
"""Largest KL, nats/token, of the first two classes; what is beyond is visible.

In the README's comparison a model with 0.0012 has the same first choice as FP32 at 98.2 % of positions, one with 0.0070
at 96.2 %, where the two first choices were all but equal.
"""


@dataclass(frozen=True)
class Accuracy:
    """The expected cost of a precision.

    Attributes:
        kl: Measured, nats/token; None: not measured, and the class is that of ``like``.
        like: The precision whose figure stands for it.
    """

    kl: float | None
    like: str | None = None

    @property
    def name(self) -> str:
        """The class: negligible, slight or visible."""
        kl = ACCURACY[self.like].kl if self.like else self.kl
        assert kl is not None
        return "negligible" if kl <= NEGLIGIBLE else "slight" if kl <= SLIGHT else "visible"


ACCURACY = {
    "fp32": Accuracy(0.0),
    "bf16": Accuracy(0.0012),
    "fp16": Accuracy(None, like="bf16"),  # three more bits of mantissa; what its range cannot hold is refused
    "int8": Accuracy(0.0041),
    "int8-weight": Accuracy(0.0025),
    "int4": Accuracy(0.430),
    "nf4": Accuracy(0.251),
    "mxfp4": Accuracy(None, like="int4"),
    "fp8": Accuracy(0.0318),
}
"""Without calibration, as a model is while loading."""

CALIBRATED = {"int8-weight": 0.0014, "fp8": 0.0153, "int4": 0.119}
"""After ``fewbits convert --method gptq``."""
