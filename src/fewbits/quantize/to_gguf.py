"""Convert a model to one GGUF file, which llama.cpp and its relatives run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from fewbits.errors import FewbitsError
from fewbits.models.filling import Progress
from fewbits.models.layouts import gguf
from fewbits.models.manifest import ManifestRow
from fewbits.models.source import Source
from fewbits.quantize.conversion import Conversion, told_rounding


def convert_to_gguf(
    source: Source,
    out: Path,
    to: str,
    *,
    overwrite: bool,
    on_manifest: Callable[[Sequence[ManifestRow]], None] | None,
    progress: Progress | None,
) -> Conversion:
    """Write a model as one GGUF file; see ``convert``.

    Raises:
        FewbitsError: If the file cannot say the precision or the architecture, or ``out`` is not free.
        OSError: If it cannot be written. Nothing is left behind then.
    """
    if out.suffix != ".gguf":
        raise FewbitsError(f"{out}: the layout gguf is one file; name it so: {out}.gguf")
    rows = gguf.plan(source, to)
    source.tokenizer()  # its vocabulary belongs in the file: one that lacks it is refused before any work
    manifest = [
        ManifestRow(
            (row.tensor or row.name).removesuffix(".weight"), row.tensor or row.name, row.shape, row.type.name.lower(),
            row.nbytes, row.reason,
        )
        for row in rows
    ]  # fmt: skip
    if on_manifest is not None:
        on_manifest(manifest)
    gguf.write(out, source, rows, overwrite=overwrite, progress=progress)
    nbytes = sum(row.nbytes for row in rows)
    type_name = gguf.gguf_type(to).name
    rounding = told_rounding(source, type_name, taken_over=False)
    return Conversion(out, to, nbytes, tuple(manifest), rounding=rounding)
