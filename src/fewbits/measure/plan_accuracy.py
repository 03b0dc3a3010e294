"""What a precision costs in accuracy, as a class: measured on one small model, and named so.

The figures are those of benchmarks/results/quality.json and docs/quantization.md: KL divergence from the same model in
FP32, in nats per token, on SmolLM2-135M-Instruct over 8 × 512 tokens. A model of billions of parameters loses less, as
a rule; the order of the precisions is what carries over.
"""

from __future__ import annotations

from dataclasses import dataclass

SOURCE = "SmolLM2-135M-Instruct, docs/quantization.md"

NEGLIGIBLE, SLIGHT = 0.005, 0.05
"""Largest KL, nats/token, of the first two classes; what is beyond is visible.

At 0.004 the likeliest token is another one at 3 or 4 of 100 positions, where two were all but equal; at 0.03 at 9; at
0.4 at 30.
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
    "bf16": Accuracy(0.0011),
    "fp16": Accuracy(None, like="bf16"),  # three more bits of mantissa; what its range cannot hold is refused
    "int8": Accuracy(0.0041),
    "int8-weight": Accuracy(0.0025),
    "int4": Accuracy(0.430),
    "nf4": Accuracy(0.251),
    "mxfp4": Accuracy(0.517),
    "fp8": Accuracy(0.0318),
}
"""Without calibration, as a model is while loading."""
