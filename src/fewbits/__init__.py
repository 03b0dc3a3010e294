"""fewbits: large models in few bits. The front door: every public name, imported when it is first used."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fewbits.errors import FewbitsError as FewbitsError
    from fewbits.errors import PrecisionWarning as PrecisionWarning
    from fewbits.formats import Format as Format
    from fewbits.measure.compare import compare as compare
    from fewbits.measure.plan import plan as plan
    from fewbits.models.load import AutoModel as AutoModel
    from fewbits.models.load import AutoModelForCausalLM as AutoModelForCausalLM
    from fewbits.models.load import AutoModelForSeq2SeqLM as AutoModelForSeq2SeqLM
    from fewbits.models.load import AutoModelForSequenceClassification as AutoModelForSequenceClassification
    from fewbits.models.load import AutoTokenizer as AutoTokenizer
    from fewbits.quantize.convert import convert as convert
    from fewbits.tensors.block import BlockCodes as BlockCodes
    from fewbits.tensors.cast import decode as decode
    from fewbits.tensors.cast import encode as encode
    from fewbits.tensors.cast import round_to as round_to
    from fewbits.train.mixed_precision import MixedPrecision as MixedPrecision
    from fewbits.train.recipe import LossScaling as LossScaling
    from fewbits.train.recipe import Recipe as Recipe

_HOMES = {
    "AutoModel": "fewbits.models.load",
    "AutoModelForCausalLM": "fewbits.models.load",
    "AutoModelForSeq2SeqLM": "fewbits.models.load",
    "AutoModelForSequenceClassification": "fewbits.models.load",
    "AutoTokenizer": "fewbits.models.load",
    "BlockCodes": "fewbits.tensors.block",
    "FewbitsError": "fewbits.errors",
    "Format": "fewbits.formats",
    "LossScaling": "fewbits.train.recipe",
    "MixedPrecision": "fewbits.train.mixed_precision",
    "PrecisionWarning": "fewbits.errors",
    "Recipe": "fewbits.train.recipe",
    "compare": "fewbits.measure.compare",
    "convert": "fewbits.quantize.convert",
    "decode": "fewbits.tensors.cast",
    "encode": "fewbits.tensors.cast",
    "formats": "fewbits.formats",
    "plan": "fewbits.measure.plan",
    "round_to": "fewbits.tensors.cast",
}

__all__ = list(_HOMES)
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """Import a public name from its home: torch and transformers load only when something needs them."""
    if name not in _HOMES:
        raise AttributeError(f"module 'fewbits' has no attribute {name!r}")
    module = import_module(_HOMES[name])
    return module if name == "formats" else getattr(module, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
