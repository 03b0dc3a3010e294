"""Write a folder as GGUF and look at the file: with fewbits, and with the gguf package's own reader."""

from pathlib import Path
from typing import Any

import gguf

from fewbits.models.layouts.gguf import GgufRow, plan, write
from fewbits.models.source import Source, open_source


def convert(folder: Path, to: str = "q8_0", **options: Any) -> tuple[Source, Source, list[GgufRow]]:
    """Write a folder as GGUF; the source, the file opened, and the rows."""
    source = open_source(folder)
    rows = plan(source, to)
    write(folder.with_suffix(".gguf"), source, rows, **options)
    return source, open_source(folder.with_suffix(".gguf")), rows


def stored(path: Path) -> dict[str, Any]:
    return {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}


def metadata(path: Path, key: str) -> Any:
    field = gguf.GGUFReader(path).get_field(key)
    return None if field is None else field.contents()
