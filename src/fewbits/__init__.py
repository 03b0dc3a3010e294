"""fewbits: large models in few bits. The front door: every public name, imported when it is first used."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fewbits.errors import FewbitsError as FewbitsError
    from fewbits.formats import Format as Format

_HOME = {
    "FewbitsError": "fewbits.errors",
    "Format": "fewbits.formats",
}

__all__ = ["FewbitsError", "Format"]  # noqa: PLE0604
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'fewbits' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME])
