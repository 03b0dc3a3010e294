"""The GGUF layout: one file with configuration, vocabulary and weights, which llama.cpp runs.

Matrices take the type of the file, vectors stay in 32 bits. Every tensor is read, encoded and written before the next
one is read, a few rows at a time: the peak is the largest tensor as it is written.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import gguf
import numpy as np
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, LlamaFileType

from fewbits.errors import FewbitsError
from fewbits.models.architecture import empty_model
from fewbits.models.gguf_blocks import BLOCK
from fewbits.models.gguf_config import ARCHITECTURES
from fewbits.models.gguf_rope import ROPE_FREQUENCIES
from fewbits.models.layouts.gguf_keys import Keys, family_of, frequency_factors, model_keys
from fewbits.models.layouts.gguf_tensors import PLAIN, GgufRow, encoded_tensor
from fewbits.models.layouts.gguf_vocabulary import vocabulary_keys
from fewbits.models.naming import check_tensors
from fewbits.models.source import Source
from fewbits.models.staging import parents_made, refuse_full_disk
from fewbits.tensors.quantized import CODE_DTYPES

_T = GGMLQuantizationType
_STORED = {"F64", "F32", "F16", "BF16", *(kind.name for kind in _T), *CODE_DTYPES} - {"I8", "I16", "I32", "I64"}


@dataclass(frozen=True)
class GgufType:
    """A type of file.

    Attributes:
        name: Its own name, as llama.cpp has it.
        matrices: The type of its matrices.
        ends: The type of the embedding and the output head.
        file_type: The number in `general.file_type`.
        precisions: The precisions of fewbits that are written so.
    """

    name: str
    matrices: GGMLQuantizationType
    ends: GGMLQuantizationType
    file_type: LlamaFileType
    precisions: tuple[str, ...]


GGUF_TYPES = {
    known.name: known
    for known in (
        GgufType("f32", _T.F32, _T.F32, LlamaFileType.ALL_F32, ("fp32",)),
        GgufType("f16", _T.F16, _T.F16, LlamaFileType.MOSTLY_F16, ("fp16",)),
        GgufType("bf16", _T.BF16, _T.BF16, LlamaFileType.MOSTLY_BF16, ("bf16",)),
        GgufType("q8_0", _T.Q8_0, _T.Q8_0, LlamaFileType.MOSTLY_Q8_0, ("int8", "int8-weight")),
        GgufType("q4_0", _T.Q4_0, _T.Q8_0, LlamaFileType.MOSTLY_Q4_0, ("int4",)),
        GgufType("q4_1", _T.Q4_1, _T.Q8_0, LlamaFileType.MOSTLY_Q4_1, ()),
    )
}


def gguf_type(name: str) -> GgufType:
    """The type of file for a precision of fewbits, or a type's own name.

    Raises:
        FewbitsError: There is none.
    """
    for known in GGUF_TYPES.values():
        if name in (known.name, *known.precisions):
            return known
    names = ", ".join(name for known in GGUF_TYPES.values() for name in (*known.precisions, known.name))
    raise FewbitsError(
        f"precision {name!r} is not written as GGUF; known: {', '.join(dict.fromkeys(names.split(', ')))}"
    )


def plan(source: Source, type_name: str) -> list[GgufRow]:
    """Decide the type of every tensor, in the order of the file.

    Args:
        source: The model, in 16 or 32 bits or block types.
        type_name: A precision (`int8` is Q8_0, `int4` Q4_0, `bf16`, `fp16`, `fp32`), or `q8_0`, `q4_0`, `q4_1`.

    Raises:
        FewbitsError: No such type, an architecture or configuration that GGUF cannot say, a tensor that is missing, has
            another shape, has no name in GGUF, or holds codes of another layout.
    """
    kind = gguf_type(type_name)
    names = _gguf_names(source)
    rows = [_row(tensor, name, source.tensors[tensor].shape, kind) for tensor, name in names.items()]
    if (factors := frequency_factors(source.config)) is not None:
        reason = "computed from the configuration: the rotary scaling"
        rows.append(GgufRow(None, ROPE_FREQUENCIES, factors.shape, _T.F32, factors.nbytes, reason))
    return rows


def write(
    path: Path,
    source: Source,
    rows: Sequence[GgufRow],
    *,
    overwrite: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Write the file under a temporary name beside it, flush it to the disk, and give it its name.

    Args:
        path: The file to write.
        source: The model that the rows were planned for.
        rows: What `plan` gave.
        overwrite: Replace `path` if it is a file.
        progress: Called with bytes of tensors written and in all.

    Raises:
        FewbitsError: `path` is not free; the tokenizer cannot be written; a weight holds NaN or Inf, or is beyond the
            type. The message names tensor and row.
        OSError: The file cannot be written. Nothing is left behind, whatever happened.
    """
    if path.is_dir() or (path.exists() and not overwrite):
        raise FewbitsError(
            f"{path} exists; give another name{'' if path.is_dir() else ', or --overwrite to replace it'}"
        )
    keys = _keys(source, rows)
    with parents_made(path):
        refuse_full_disk(path, sum(row.nbytes for row in rows))
        _write_file(path, source, rows, keys, progress)


def _write_file(
    path: Path, source: Source, rows: Sequence[GgufRow], keys: Keys, progress: Callable[[int, int], None] | None
) -> None:
    staging = path.with_name(f".{path.name}.incomplete")
    writer = gguf.GGUFWriter(staging, family_of(source.config, source.path).architecture)
    try:
        _write_header(writer, keys, rows)
        done, total = 0, sum(row.nbytes for row in rows)
        for row in rows:
            writer.write_tensor_data(encoded_tensor(source, row))
            done += row.nbytes
            if progress is not None:
                progress(done, total)
        writer.close()
        with staging.open("rb+") as file:
            os.fsync(file.fileno())
        staging.replace(path)
    except BaseException as error:
        writer.close()
        staging.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno and error.filename is None:  # a full disk names none
            error.filename = os.fspath(path)
        raise


def _gguf_names(source: Source) -> dict[str, str]:
    """From Hugging Face name to the name in the file, for every tensor that is written, in the order of the source."""
    config, path = source.config, source.path
    family = family_of(config, path)
    model_keys(config, path)  # refuses what cannot be said, before any work
    model = empty_model(config, torch.bfloat16)
    places = check_tensors(model, {name: tensor.shape for name, tensor in source.tensors.items()}, path)
    name_map = gguf.get_tensor_name_map(ARCHITECTURES[family.architecture].names, config.num_hidden_layers)
    names = {}
    for name, tensor in source.tensors.items():
        parameter = places[name].parameter if name in places else name
        if parameter in model.all_tied_weights_keys or name.endswith(".rotary_emb.inv_freq"):
            continue  # a copy of the embedding, or of what the configuration says
        if tensor.stored_as not in _STORED:
            raise FewbitsError(
                f"{path}: {name} is stored as {tensor.stored_as}, codes that are not read here; convert the model that "
                "it was made from"
            )
        module, _, leaf = parameter.rpartition(".")
        if (found := name_map.get_name(module)) is None:
            raise FewbitsError(f"{path}: tensor {name!r} has no name in GGUF; use --layout compressed-tensors")
        names[name] = f"{found}.{leaf}"
    return names


def _row(tensor: str, name: str, shape: tuple[int, ...], kind: GgufType) -> GgufRow:
    stored, reason = kind.matrices, None
    if len(shape) == 1:
        stored, reason = _T.F32, "a vector: readers take 32 bits"
    elif shape[-1] % GGML_QUANT_SIZES[stored][0]:
        stored, reason = _T.F16, f"its rows of {shape[-1]} elements are not whole blocks of {BLOCK}"
    elif name in ("token_embd.weight", "output.weight") and kind.ends is not stored:
        stored, reason = kind.ends, f"embedding or output head: more exact than {kind.matrices.name}"
    reason = reason if stored is not kind.matrices else None
    block, block_bytes = GGML_QUANT_SIZES[stored]
    return GgufRow(tensor, name, shape, stored, math.prod(shape) // block * block_bytes, reason)


def _keys(source: Source, rows: Sequence[GgufRow]) -> Keys:
    config, generation = source.config, source.generation_config()
    file_type = _file_type(rows)
    name = getattr(config, "_model_name_or_path", None) or source.path.name.removesuffix(".gguf")
    keys: Keys = {"general.type": "model", "general.name": name, "general.file_type": int(file_type)}
    if any(row.type not in PLAIN for row in rows):
        keys["general.quantization_version"] = gguf.GGML_QUANT_VERSION
    ends = getattr(generation, "eos_token_id", None)
    ends = ends if isinstance(ends, list) else []
    keys |= model_keys(config, source.path)
    return keys | vocabulary_keys(source.tokenizer(), config.vocab_size, source.path, ends=ends)


def _file_type(rows: Sequence[GgufRow]) -> LlamaFileType:
    matrices = {row.type for row in rows if row.reason is None}
    return next(
        (known.file_type for known in GGUF_TYPES.values() if {known.matrices} == matrices), LlamaFileType.GUESSED
    )


def _write_header(writer: gguf.GGUFWriter, keys: Keys, rows: Sequence[GgufRow]) -> None:
    for key, value in keys.items():
        match value:
            case bool():
                writer.add_bool(key, value)
            case int():
                writer.add_uint32(key, value)
            case float():
                writer.add_float32(key, value)
            case str():
                writer.add_string(key, value)
            case _ if value:
                writer.add_array(key, value)
    for row in rows:
        block, block_bytes = GGML_QUANT_SIZES[row.type]
        nbytes_shape = (*row.shape[:-1], row.shape[-1] // block * block_bytes)
        writer.add_tensor_info(row.name, nbytes_shape, np.dtype(np.uint8), row.nbytes, raw_dtype=row.type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
