"""Methods by name: how codes are found, and what is folded into neighbouring weights before, joined by +."""

from __future__ import annotations

from dataclasses import dataclass

from fewbits.errors import FewbitsError

CODES = ("absmax", "mse", "gptq")
FOLDS = ("smoothquant", "quarot")
METHODS = (*CODES, *FOLDS)


@dataclass(frozen=True)
class Method:
    """How a model is quantized.

    Attributes:
        codes: How codes and scales are found, one of ``CODES``.
        folds: What is folded into weights before, of ``FOLDS`` and in their order.
    """

    codes: str = "absmax"
    folds: tuple[str, ...] = ()

    @classmethod
    def named(cls, name: str) -> Method:
        """Read ``gptq`` or ``smoothquant+gptq``; the order in which parts are written means nothing.

        Raises:
            FewbitsError: If a part is unknown or named twice, or there are two ways to find codes.
        """
        parts = name.split("+")
        for part in parts:
            if part not in METHODS:
                raise FewbitsError(f"method {part!r} is unknown; known: {', '.join(METHODS)}, joined by +")
            if parts.count(part) > 1:
                raise FewbitsError(f"method {name!r} names {part} twice; name it once")
        codes = [part for part in CODES if part in parts]
        if len(codes) > 1:
            raise FewbitsError(f"method {name!r}: {' and '.join(codes)} exclude each other, as each finds the codes")
        return cls(codes[0] if codes else "absmax", tuple(part for part in FOLDS if part in parts))

    @property
    def name(self) -> str:
        """As users write it."""
        return "+".join((*self.folds, self.codes) if self.codes != "absmax" or not self.folds else self.folds)

    @property
    def reads_text(self) -> bool:
        """Whether it needs activations, and so a text to calibrate on."""
        return self.codes == "gptq" or "smoothquant" in self.folds
