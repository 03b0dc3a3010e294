"""A model's configuration, and nothing else of it: not even a file of weights has to be there."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import AutoConfig, PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from fewbits.errors import FewbitsError
from fewbits.models.adapters.families import adapted_config
from fewbits.models.adapters.raw_config import read_json
from fewbits.models.layouts import bitsandbytes, compressed_tensors
from fewbits.models.layouts.compressed_schemes import Schemes, schemes_of
from fewbits.models.precision import PRECISIONS, Precision
from fewbits.models.source import is_hub_id


@dataclass(frozen=True)
class Configuration:
    """What is known of a model before any of it is downloaded.

    Attributes:
        name: As the user gave it.
        config: As transformers has it.
        schemes: Of a checkpoint that is quantized already: what its layers are; else None.
        kept: Modules that such a checkpoint leaves in float.
        names_no_architecture: Whether `config.json` does not say which model class it is for.
    """

    name: str
    config: PreTrainedConfig
    schemes: Schemes | Precision | None = None
    kept: tuple[str, ...] = ()
    names_no_architecture: bool = False

    def stored_as(self, module: str) -> Precision | None:
        """The precision that a layer is stored in; None if it is plain values."""
        if self.schemes is None or module in self.kept:
            return None
        if not isinstance(self.schemes, Schemes):
            return self.schemes
        try:
            return self.schemes.of(module).precision
        except FewbitsError:  # several schemes, and none is for this layer
            return None


def read_configuration(model: str | os.PathLike[str], *, revision: str | None = None) -> Configuration:
    """Read the configuration of a Hub id (`config.json` is downloaded), a folder, or a `.gguf` file (its header).

    Raises:
        FewbitsError: There is no such model, its configuration is broken, or it is of an architecture that only code
            of its own could build.
    """
    name, path = os.fspath(model), Path(model).expanduser()
    if path.is_file():
        return Configuration(name, _of_file(path))
    if not path.is_dir():
        if not is_hub_id(name):
            raise FewbitsError(
                f"no such file or folder: {path}; give a folder with config.json, a .gguf file, or a Hub id "
                "(owner/name)"
            )
        from fewbits.models.hub import fetch_config  # imported here: only a Hub id needs the network client

        path = fetch_config(name, revision=revision)
    if not (path / "config.json").is_file():
        ggufs = sorted(path.glob("*.gguf"))
        remedy = f"give the GGUF file itself: {ggufs[0]}" if ggufs else "copy it from where the model came from"
        raise FewbitsError(f"{path}: has no config.json; {remedy}")
    settings = read_json(path / "config.json")
    config = adapted_config(path) or _of_settings(path, settings)
    quantization = settings.get("quantization_config")
    schemes, kept = (None, ()) if quantization is None else _stored(path, quantization)
    return Configuration(name, config, schemes, kept, not config.architectures)


def _of_file(path: Path) -> PreTrainedConfig:
    from fewbits.models.source import open_source  # a .gguf file holds no configuration but in its header

    return open_source(path).config


def _of_settings(path: Path, settings: dict[str, Any]) -> PreTrainedConfig:
    """What transformers makes of a `config.json`; code of the model's own is never run."""
    kind, named = settings.get("model_type"), settings.get("architectures")
    if not isinstance(kind, str) or not kind:
        raise FewbitsError(f"{path}: config.json has no model_type, which says what it is; fetch the model again")
    if named is not None and not (isinstance(named, list) and all(isinstance(each, str) for each in named)):
        raise FewbitsError(f"{path}: architectures in config.json is {named!r}, no list of names; fetch it again")
    if kind not in CONFIG_MAPPING:
        what = f"{', '.join(named)} ({kind})" if named else repr(kind)
        why = (
            "only its own code could build it, which is not run here" if settings.get("auto_map") else "it may be newer"
        )
        raise FewbitsError(
            f"{path}: transformers does not know the architecture {what}: {why}; update transformers, or name a "
            "conversion of the model that transformers carries (often with -hf in its name)"
        )
    try:
        return AutoConfig.from_pretrained(path, trust_remote_code=False)
    except Exception as error:  # transformers raises whatever the file makes it stumble over
        raise FewbitsError(f"{path}: transformers cannot read config.json: {' '.join(str(error).split())}") from error


def _stored(path: Path, found: Any) -> tuple[Schemes | Precision, tuple[str, ...]]:
    """What a checkpoint that is quantized already says of its layers."""
    config = dict(found) if isinstance(found, dict) else {}
    method = config.get("quant_method")
    if method in (compressed_tensors.NAME, compressed_tensors.ROTATED):
        return schemes_of(config, path), tuple(config.get("ignore") or ())
    if method == bitsandbytes.NAME or (method is None and config.get("load_in_8bit")):
        precision = PRECISIONS["int8" if config.get("load_in_8bit") else "nf4"]
        return precision, tuple(config.get("llm_int8_skip_modules") or ())
    raise FewbitsError(f"{path}: quant_method {method!r} is not read; plan the model that it was made from")
