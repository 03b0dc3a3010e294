"""A `config.json` as it is, read as JSON: transformers refuses one whose `model_type` it does not carry."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fewbits.errors import FewbitsError


@dataclass(frozen=True)
class RawConfig:
    """The settings in a folder's `config.json`, of a family that goes by `family` in messages."""

    path: Path
    family: str
    settings: dict[str, Any]

    def count(self, key: str) -> int:
        """A setting that is a whole number above zero.

        Raises:
            FewbitsError: It is missing, or anything else.
        """
        value = self.settings.get(key)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise FewbitsError(
                f"{self.path}: {key} in config.json of a {self.family} model must be a whole number above 0, but is "
                f"{value!r}; fetch it again"
            )
        return value

    def number(self, key: str, default: float) -> float:
        """A setting that is a number above zero, or its default where it is missing.

        Raises:
            FewbitsError: It is anything else.
        """
        value = self.settings.get(key, default)
        if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < float("inf"):
            raise FewbitsError(f"{self.path}: {key} in config.json is {value!r}, not a number above 0; fetch it again")
        return float(value)

    def refuse(self, key: str, why: str, remedy: str) -> FewbitsError:
        """The error for a setting that cannot be presented as a model that transformers carries."""
        return FewbitsError(f"{self.path}: {self.family} with {key}={self.settings.get(key)!r} {why}; {remedy}")

    @property
    def dtype(self) -> torch.dtype:
        """The dtype the checkpoint says it is in; float32 if it does not say."""
        name = self.settings.get("torch_dtype") or self.settings.get("dtype") or "float32"
        dtype = getattr(torch, str(name), None)
        if not isinstance(dtype, torch.dtype):
            raise FewbitsError(f"{self.path}: torch_dtype in config.json is {name!r}, no dtype; fetch it again")
        return dtype


def read_json(path: Path) -> dict[str, Any]:
    """A file with a JSON object; empty if there is no such file.

    Raises:
        FewbitsError: It is not JSON, or no object.
    """
    if not path.is_file():
        return {}
    try:
        content: Any = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise FewbitsError(f"{path}: is not JSON ({error}); fetch it again") from error
    if not isinstance(content, dict):
        raise FewbitsError(f"{path}: is not a JSON object; fetch it again")
    return content
