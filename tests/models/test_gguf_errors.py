"""Bad GGUF files: each is refused in one line that names the file, the byte where that is known, and the remedy."""

import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGMLQuantizationType as T
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_gguf import TinyGguf, tiny_config

from fewbits.errors import FewbitsError
from fewbits.models.gguf_parser import read_gguf_header
from fewbits.models.source import open_source


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value.encode())) + value.encode()


def key(name: str, kind: int, value: bytes) -> bytes:
    return text(name) + struct.pack("<I", kind) + value


def tensor(name: str, shape: list[int], kind: int = 0, offset: int = 0) -> bytes:
    return text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)


def header(
    tensors: Sequence[bytes] = (),
    keys: Sequence[bytes] = (),
    *,
    version: int = 3,
    data: int = 0,
    tensor_count: int | None = None,
    key_count: int | None = None,
) -> bytes:
    counts = len(tensors) if tensor_count is None else tensor_count, len(keys) if key_count is None else key_count
    head = b"GGUF" + struct.pack("<IQQ", version, *counts) + b"".join(keys) + b"".join(tensors)
    return head + bytes(-len(head) % 32) + bytes(data)


HEADERS: dict[str, tuple[bytes, str]] = {
    "empty": (b"", r"0 bytes are too few for a GGUF header \(24 bytes\)"),
    "magic": (b"GGML" + bytes(40), r"starts with b'GGML', not b'GGUF'; this is not a GGUF file"),
    "version": (header(version=1), r"byte 4: GGUF version 1 is not read \(2 and 3 are\); convert"),
    "big-endian": (header(version=0x03000000), r"byte 4: a big-endian GGUF, which is not read; convert"),
    "tensor count": (
        header(tensor_count=2**60),
        r"byte 8: 1152921504606846976 tensors cannot fit in the \d+ bytes that follow",
    ),
    "key count": (header(key_count=2**60), r"byte 16: 1152921504606846976 metadata keys cannot fit"),
    "key past the end": (
        header(key_count=1)[:24] + bytes([255] * 8) + bytes(8),
        r"byte 32: a metadata key needs \d+ bytes, but",
    ),
    "key not UTF-8": (
        header(keys=[struct.pack("<Q", 1) + b"\xff" + bytes(5)]),
        r"byte 24: a metadata key is not UTF-8",
    ),
    "key twice": (header(keys=[key("a", 0, b"\0")] * 2), r"byte 38: metadata key 'a' appears twice"),
    "unknown type": (header(keys=[key("a", 13, bytes(8))]), r"byte 33: metadata key 'a' has the unknown type 13"),
    "nested array": (
        header(keys=[key("a", 9, struct.pack("<IQ", 9, 0))]),
        r"byte 37: metadata key 'a' is an array of elements of type 9, which is not read",
    ),
    "array too long": (
        header(keys=[key("a", 9, struct.pack("<IQ", 4, 2**40))]),
        r"byte 41: 1099511627776 elements of 'a' cannot fit in",
    ),
    "strings too long": (
        header(keys=[key("a", 9, struct.pack("<IQ", 8, 2) + text("x") + struct.pack("<Q", 2**63))]),
        r"byte 49: 2 elements of 'a' run past the end of the file",
    ),
    "alignment": (
        header([tensor("t", [1])], [key("general.alignment", 4, struct.pack("<I", 24))], data=4),
        r"general.alignment is 24, not a power of two",
    ),
    "dimensions": (header([tensor("t", [1] * 5)]), r"byte 24: tensor 't' has 5 dimensions, not 1 to 4"),
    "tensor type": (
        header([tensor("t", [1], kind=99)]),
        r"tensor 't' has the unknown type 99; upgrade the gguf package",
    ),
    "blocks": (
        header([tensor("t", [33], kind=8)], data=64),
        r"tensor 't' of shape \[33\] is not made of Q8_0 blocks of 32",
    ),
    "no elements": (header([tensor("t", [0])], data=4), r"tensor 't' of shape \[0\] is not made of F32 blocks of 1"),
    "offset": (header([tensor("t", [1], offset=4)], data=8), r"tensor 't' has offset 4, not a multiple of 32"),
    "twice": (header([tensor("t", [1])] * 2, data=4), r"tensor 't' appears twice"),
    "past the end": (
        header([tensor("t", [8])], data=16),
        r"byte 24: tensor 't' lies at bytes 64 to 96, but the file ends at byte 80",
    ),
    "overlap": (header([tensor("t", [16]), tensor("u", [2], offset=32)], data=64), r"tensor 'u' overlaps tensor 't'"),
}


@pytest.mark.parametrize("case", HEADERS)
def test_a_header_that_lies_is_refused(tmp_path: Path, case: str) -> None:
    data, message = HEADERS[case]
    path = tmp_path / "bad.gguf"
    path.write_bytes(data)
    with pytest.raises(FewbitsError, match=message) as caught:
        open_source(path)
    assert str(caught.value).startswith(str(path))
    assert "\n" not in str(caught.value)


METADATA: dict[str, tuple[dict[str, Any], str]] = {
    "architecture": (
        {"metadata": {"general.architecture": "falcon"}},
        r"architecture 'falcon' is not read from GGUF \(llama, mistral, qwen2, qwen3, phi3, gemma3 are\); use the",
    ),
    "experts": (
        {"metadata": {"llama.expert_count": 8}},
        r"architecture 'llama' with experts is not read from GGUF",
    ),
    "two architectures": (
        {"metadata": {"general.architecture": [1, 2]}},
        r"metadata key general.architecture is 2 values, not text",
    ),
    "expert array": (
        {"metadata": {"llama.expert_count": [1, 2]}},
        r"llama.expert_count is 2 values, not a whole number",
    ),
    "scaling array": (
        {"metadata": {"llama.rope.scaling.type": [1, 2]}},
        r"metadata key llama.rope.scaling.type is 2 values, not text",
    ),
    "token array": (
        {"metadata": {"tokenizer.ggml.eos_token_id": [1, 2]}},
        r"transformers refuses its configuration: .*eos_token_id",
    ),
    "parts": (
        {"metadata": {"split.count": 3}},
        r"is one of 3 parts of a model; join them with llama-gguf-split --merge",
    ),
    "absent": (
        {"without": ("llama.block_count",)},
        r"metadata key llama.block_count is absent, not a positive whole number; convert",
    ),
    "no number": (
        {"metadata": {"llama.embedding_length": "many"}},
        r"metadata key llama.embedding_length is 'many', not a positive whole number",
    ),
    "per layer": (
        {"metadata": {"llama.attention.head_count_kv": [2, 1]}},
        r"metadata key llama.attention.head_count_kv is 2 values, not a positive whole number",
    ),
    "blocks": ({"metadata": {"llama.block_count": 10**9}}, r"1000000000 blocks cannot be made of 21 tensors"),
    "base": (
        {"metadata": {"llama.rope.freq_base": -1.0}},
        r"metadata key llama.rope.freq_base is -1.0, not a positive number",
    ),
    "scaling": (
        {"metadata": {"llama.rope.scaling.type": "longrope"}},
        r"rotary scaling 'longrope' is not read \(linear and yarn are\)",
    ),
    "partial rotary": ({"metadata": {"llama.rope.dimension_count": 8}}, r"rotates 8 of 16 elements of a head"),
    "frequencies": (
        {"tensors": {"rope_freqs.weight": np.arange(1, 9, dtype=np.float32)}},
        r"the factors in 'rope_freqs.weight' are not those of Llama 3's rotary scaling",
    ),
    "configuration": (
        {"metadata": {"llama.attention.layer_norm_rms_epsilon": "small"}},
        r"transformers refuses its configuration: ",
    ),
}


@pytest.mark.parametrize("case", METADATA)
def test_metadata_that_describes_no_model_is_refused(tmp_path: Path, case: str) -> None:
    changes, message = METADATA[case]
    TinyGguf(**changes).write(tmp_path / "bad.gguf")
    with pytest.raises(FewbitsError, match=message) as caught:
        open_source(tmp_path / "bad.gguf")
    assert "\n" not in str(caught.value)


TENSORS: dict[str, tuple[dict[str, Any], str]] = {
    "missing": (
        {"without": ("blk.1.ffn_up.weight",)},
        r"lacks 'blk.1.ffn_up.weight' \(the parameter model.layers.1.mlp.up_proj.weight\); fetch the file again",
    ),
    "left over": (
        {"tensors": {"blk.0.ssm.weight": np.ones(3, np.float32)}},
        r"tensor 'blk.0.ssm.weight' is no parameter of a llama model",
    ),
    "shape": (
        {"tensors": {"output_norm.weight": np.ones(3, np.float32)}},
        r"tensor 'output_norm.weight' has shape \[3\], but the metadata asks for \[64\]",
    ),
    "model": (
        {"metadata": {"llama.embedding_length": 2**32 - 8}},
        r"transformers cannot build the model: ",
    ),
}


@pytest.mark.parametrize("case", TENSORS)
def test_tensors_that_are_not_the_model_are_refused(tmp_path: Path, case: str) -> None:
    changes, message = TENSORS[case]
    TinyGguf(**changes).write(tmp_path / "bad.gguf")
    with pytest.raises(FewbitsError, match=message):
        _ = open_source(tmp_path / "bad.gguf").tensors


def test_a_type_without_dequantizer_is_refused(tmp_path: Path) -> None:
    TinyGguf(config=tiny_config(hidden_size=256), raw={"blk.0.ffn_up.weight": T.Q8_K}).write(tmp_path / "bad.gguf")
    message = r"tensor 'blk.0.ffn_up.weight' is stored as Q8_K, which the gguf package cannot dequantize; use a file in"
    with pytest.raises(FewbitsError, match=message):
        _ = open_source(tmp_path / "bad.gguf").tensors


TOKENIZERS: dict[str, tuple[dict[str, Any], str]] = {
    "none": ({"tokenizer": None}, r"has no vocabulary \(metadata key tokenizer.ggml.tokens\)"),
    "unknown": ({"metadata": {"tokenizer.ggml.model": "rwkv"}}, r"transformers cannot build its tokenizer: .*rwkv"),
    "special token": (
        {"metadata": {"tokenizer.ggml.eos_token_id": 900}},
        r"tokenizer.ggml.eos_token_id is 900, but the vocabulary has 261 tokens",
    ),
}


@pytest.mark.parametrize("case", TOKENIZERS)
def test_a_tokenizer_that_cannot_be_built_is_refused(tmp_path: Path, case: str) -> None:
    changes, message = TOKENIZERS[case]
    TinyGguf(**changes).write(tmp_path / "bad.gguf")
    with pytest.raises(FewbitsError, match=message):
        open_source(tmp_path / "bad.gguf").tokenizer()


def test_a_vocabulary_that_is_not_utf8_is_refused(tmp_path: Path) -> None:
    TinyGguf().write(tmp_path / "bad.gguf")
    data = (tmp_path / "bad.gguf").read_bytes().replace(b"<|user|>", b"<|us\xffr|>", 1)
    (tmp_path / "bad.gguf").write_bytes(data)
    with pytest.raises(FewbitsError, match=r"the array of strings at byte \d+ holds one that is not UTF-8"):
        open_source(tmp_path / "bad.gguf").tokenizer()


def test_a_file_that_is_cut_off_after_opening_is_noticed(tmp_path: Path) -> None:
    TinyGguf().write(tmp_path / "cut.gguf")
    source = open_source(tmp_path / "cut.gguf")
    with (tmp_path / "cut.gguf").open("r+b") as file:
        file.truncate(source.size - 40)
    last = list(source.tensors)[-1]
    with pytest.raises(FewbitsError, match=rf"ends inside tensor '.*' at byte {source.size - 40}; it was cut off"):
        source.read(last)


@pytest.fixture(scope="module")
def valid(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("fuzz") / "tiny.gguf"
    TinyGguf(config=tiny_config(num_hidden_layers=1), type=T.Q8_0).write(path)
    return path


# Where a byte is changed, and to what; most land in the header, which comes first.
CHANGES = st.lists(st.tuples(st.floats(0, 1), st.integers(0, 255)), min_size=1, max_size=4)


def corrupt(valid: Path, changes: list[tuple[float, int]], reach: float) -> Path:
    data = bytearray(valid.read_bytes())
    for place, byte in changes:
        data[int(place * reach * (len(data) - 1))] = byte
    path = valid.with_name("corrupt.gguf")
    path.write_bytes(data)
    return path


@contextmanager
def named(path: Path) -> Iterator[None]:
    """Nothing is raised, or an error that names the file."""
    try:
        yield
    except FewbitsError as error:
        if not str(error).startswith(f"{path}: "):
            raise


@settings(max_examples=600, deadline=None)
@given(changes=CHANGES)
def test_fuzz_header(valid: Path, changes: list[tuple[float, int]]) -> None:
    path = corrupt(valid, changes, 0.15)
    with named(path):
        read_gguf_header(path)


@settings(max_examples=150, deadline=None)
@given(changes=CHANGES)
def test_fuzz_whole_file(valid: Path, changes: list[tuple[float, int]]) -> None:
    path = corrupt(valid, changes, 0.3)
    with named(path):
        source = open_source(path)
        source.generation_config()
        for name, stored in source.tensors.items():
            assert source.read(name).shape == stored.shape
        source.tokenizer()


@settings(max_examples=300, deadline=None)
@given(length=st.floats(0, 0.99))
def test_fuzz_truncation(valid: Path, length: float) -> None:
    data = valid.read_bytes()
    path = valid.with_name("truncated.gguf")
    path.write_bytes(data[: int(length * len(data))])
    with pytest.raises(FewbitsError, match=r"truncated.gguf: "):
        open_source(path)
