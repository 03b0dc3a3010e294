"""The families that have an adapter, by the `model_type` in their `config.json`."""

from collections.abc import Callable
from pathlib import Path

from transformers import PreTrainedConfig

from fewbits.errors import FewbitsError
from fewbits.models.adapters.baichuan import adapt_baichuan, baichuan_config
from fewbits.models.adapters.chatglm import adapt_chatglm, chatglm_config
from fewbits.models.adapters.raw_config import RawConfig, read_json
from fewbits.models.source import Source

ADAPTERS: dict[str, tuple[str, Callable[[Source, RawConfig], Source]]] = {
    "chatglm": ("ChatGLM", adapt_chatglm),
    "baichuan": ("Baichuan", adapt_baichuan),
}
"""What to call the family, and its adapter."""

_CONFIGS: dict[str, Callable[[RawConfig], PreTrainedConfig]] = {
    "chatglm": chatglm_config,
    "baichuan": baichuan_config,
}


def adapted(source: Source) -> Source:
    """The folder as a model that transformers carries: adapted if its family has an adapter, else as it is.

    Raises:
        FewbitsError: The family has an adapter, but this checkpoint is a variant that cannot be presented so.
    """
    try:
        settings = read_json(source.path / "config.json")
    except FewbitsError:
        return source  # whose configuration says what is wrong with the file
    model_type = settings.get("model_type")
    if not isinstance(model_type, str) or model_type not in ADAPTERS:
        return source
    family, adapt = ADAPTERS[model_type]
    raw = RawConfig(source.path, family, settings)
    if settings.get("quantization_config") is not None:
        raise raw.refuse("quantization_config", "is quantized already", "give the model that it was made from")
    return adapt(source, raw)


def adapted_config(folder: Path) -> PreTrainedConfig | None:
    """The configuration under which a family's model is carried; None if the family has no adapter.

    Nothing of the folder is read but its `config.json` and, of ChatGLM, `tokenizer_config.json`.

    Raises:
        FewbitsError: As `adapted`, or `config.json` is not JSON.
    """
    settings = read_json(folder / "config.json")
    model_type = settings.get("model_type")
    if not isinstance(model_type, str) or model_type not in _CONFIGS:
        return None
    return _CONFIGS[model_type](RawConfig(folder, ADAPTERS[model_type][0], settings))
