"""Mixed-precision training: recipes, low-precision matmuls, loss scaling, the fused optimizer sweep."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fewbits.train.trainer import MixedPrecisionTrainer as MixedPrecisionTrainer


def __getattr__(name: str) -> Any:
    """Import the Trainer when it is asked for: transformers loads slowly."""
    if name != "MixedPrecisionTrainer":
        raise AttributeError(f"module 'fewbits.train' has no attribute {name!r}")
    from fewbits.train.trainer import MixedPrecisionTrainer

    return MixedPrecisionTrainer
