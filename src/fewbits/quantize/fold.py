"""What a method folds into the weights of a model before they are quantized."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from fewbits.errors import FewbitsError
from fewbits.models.source import Source
from fewbits.quantize.calibrate import calibration_windows
from fewbits.quantize.method import Method
from fewbits.quantize.quarot import quarot
from fewbits.quantize.smoothquant import smoothquant
from fewbits.quantize.to_folder import context_of, has_tokenizer


def fold(
    source: Source, method: Method, text: Path | None = None, on_block: Callable[[int, int], None] | None = None
) -> Source:
    """The source as a method's folds change it; itself where there are none.

    Rotations come first: a gain that a norm has is part of the weights after them, and one that smoothing gave it would
    be lost there.

    Args:
        source: The model.
        method: How it is quantized.
        text: What it is calibrated on; None: the built-in one.
        on_block: Called with blocks that the text has run through and blocks in all.

    Raises:
        FewbitsError: If the model is not one that a fold is exact for, or has no tokenizer to read the text with.
    """
    if "quarot" in method.folds:
        source = quarot(source)
    if "smoothquant" in method.folds:
        if not has_tokenizer(source):
            raise FewbitsError(f"method='smoothquant': {source.path} has no tokenizer to read text with; use 'mse'")
        source = smoothquant(source, calibration_windows(source.tokenizer(), text, context_of(source)), on_block)
    return source
