import json
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save, save_file
from tiny_gguf import TinyGguf, tiny_config
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from fewbits.errors import FewbitsError
from fewbits.models.safetensors_folder import INDEX, SINGLE
from fewbits.models.safetensors_header import DTYPES, read_safetensors_header
from fewbits.models.source import StoredTensor, open_source


def save_model(folder: Path, **options: Any) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(tiny_config(), dtype=torch.bfloat16)
    model.save_pretrained(folder, **options)
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def raw_file(entries: Any, data: bytes = b"", *, length: int | None = None) -> bytes:
    text = entries if isinstance(entries, bytes) else json.dumps(entries).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(begin: int = 0, end: int = 4, *, dtype: str = "F32", shape: Any = (1,)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


@pytest.mark.parametrize("options", [{}, {"max_shard_size": "20KB"}], ids=["one file", "shards"])
def test_a_saved_model_is_read_back(tmp_path: Path, options: dict[str, Any]) -> None:
    expected = save_model(tmp_path, **options)
    source = open_source(tmp_path)
    shards = list(tmp_path.glob("*.safetensors"))
    assert (len(shards) > 1) == bool(options)
    assert source.size == sum(file.stat().st_size for file in shards)
    assert source.config.model_type == "llama"
    assert source.config.dtype == torch.bfloat16
    assert source.tensors.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(source.read(name), tensor), name
        assert torch.equal(source.read_rows(name, 3, 17), tensor[3:17]), name
        assert source.tensors[name] == StoredTensor(name, tuple(tensor.shape), "BF16", 2 * tensor.numel())


def test_tensors_come_in_file_order(tmp_path: Path) -> None:
    save_file({"b": torch.zeros(2), "a": torch.ones(3), "wide": torch.zeros(1, dtype=torch.float64)}, tmp_path / SINGLE)
    with safe_open(tmp_path / SINGLE, "pt") as file:
        assert list(open_source(tmp_path).tensors) == list(file.offset_keys())


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=str)
@pytest.mark.parametrize("shape", [(), (0,), (5,), (3, 4), (2, 0, 3)], ids=str)
def test_every_dtype_and_shape(tmp_path: Path, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    tensor = torch.zeros(shape, dtype=torch.uint8).to(dtype)
    if tensor.numel():
        tensor.view(-1).view(torch.uint8)[:] = torch.arange(tensor.nbytes) % 2
    save_file({"t": tensor, "after": torch.ones(1, dtype=torch.uint8)}, tmp_path / SINGLE)
    read = open_source(tmp_path).read("t")
    assert (read.dtype, read.shape) == (dtype, tensor.shape)
    assert read.untyped_storage().tolist() == tensor.untyped_storage().tolist()


def test_tokenizer_and_generation_config_are_those_of_the_folder(tmp_path: Path) -> None:
    save_model(tmp_path)
    TinyGguf().write(tmp_path / "tiny.gguf")
    open_source(tmp_path / "tiny.gguf").tokenizer().save_pretrained(tmp_path)
    (tmp_path / "generation_config.json").unlink(missing_ok=True)
    source = open_source(tmp_path)
    assert source.tokenizer()("hello").input_ids == AutoTokenizer.from_pretrained(tmp_path)("hello").input_ids
    assert source.generation_config() is None
    GenerationConfig(max_new_tokens=7).save_pretrained(tmp_path)
    generation = source.generation_config()
    assert generation is not None
    assert generation.max_new_tokens == 7


HEADERS: dict[str, tuple[bytes, str]] = {
    "empty": (b"", r"byte 0: a header of 0 bytes does not fit in a file of 0 bytes"),
    "length": (raw_file({}, length=2**62), r"byte 0: a header of \d+ bytes does not fit in a file of 10 bytes"),
    "not JSON": (raw_file(b'{"a": ?}'), r"byte 14: the header is not JSON \(Expecting value"),
    "not UTF-8": (raw_file(b'{"\xff": 1}'), r"byte 8: the header is not JSON \('utf-8' codec"),
    "deep": (raw_file(b"[" * 100_000), r"the header is not JSON \("),
    "no object": (raw_file([]), r"byte 8: the header is not a JSON object"),
    "twice": (raw_file(b'{"a": 1, "a": 2}'), r"the header is not JSON \('a' appears twice\)"),
    "no entry": (raw_file({"a": {"dtype": "F32"}}), r"byte 8: tensor 'a' has no dtype, shape and data_offsets"),
    "dtype": (raw_file({"a": entry(dtype="F4")}), r"tensor 'a' has dtype 'F4', which is not read \(F64, F32,"),
    "shape": (raw_file({"a": entry(shape=[-1])}, bytes(4)), r"byte 8: tensor 'a' has shape \[-1\]"),
    "absurd shape": (raw_file({"a": entry(0, 0, shape=[0, 2**62, 2])}), r"byte 8: tensor 'a' has shape \[0, 46116"),
    "no int64": (raw_file({"a": entry(0, 0, shape=[2**70, 0])}), r"byte 8: tensor 'a' has shape \[11805"),
    "nbytes": (raw_file({"a": entry(0, 5)}, bytes(5)), r"tensor 'a', F32 of shape \[1\], is 4 bytes, not bytes 0 to 5"),
    "hole": (
        raw_file({"a": entry(), "b": entry(8, 12)}, bytes(12)),
        r"byte 135: tensor 'b' begins at byte 139, not where the one before it ends",
    ),
    "overlap": (raw_file({"a": entry(), "b": entry(2, 6)}, bytes(6)), r"tensor 'b' begins at byte \d+, not where"),
    "truncated": (
        raw_file({"a": entry()}, bytes(3)),
        r"byte 72: the file ends inside tensor 'a' \(bytes 69 to 73\)",
    ),
    "trailing": (raw_file({"a": entry()}, bytes(6)), r"byte 73: 2 bytes follow the last tensor"),
}


@pytest.mark.parametrize("case", HEADERS)
def test_a_header_that_lies_is_refused(tmp_path: Path, case: str) -> None:
    data, message = HEADERS[case]
    (tmp_path / SINGLE).write_bytes(data)
    with pytest.raises(FewbitsError, match=message) as caught:
        open_source(tmp_path)
    assert str(caught.value).startswith(str(tmp_path / SINGLE))
    assert "\n" not in str(caught.value)


def rewrite_index(folder: Path, **weight_map: Any) -> None:
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"] |= weight_map
    (folder / INDEX).write_text(json.dumps(index))


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    save_model(tmp_path, max_shard_size="20KB")
    shard = sorted(tmp_path.glob("*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(FewbitsError, match=rf"index.json: names the shard '{shard.name}', which is missing: fetch it"):
        open_source(tmp_path)


def test_a_tensor_that_is_not_in_its_shard_is_named(tmp_path: Path) -> None:
    save_model(tmp_path, max_shard_size="20KB")
    shard = min(tmp_path.glob("*.safetensors")).name
    rewrite_index(tmp_path, ghost=shard)
    with pytest.raises(FewbitsError, match=rf"tensor 'ghost' is not in its shard {shard}; fetch both again"):
        open_source(tmp_path)


def test_a_tensor_that_the_index_does_not_list_is_named(tmp_path: Path) -> None:
    save_file({"a": torch.ones(1), "b": torch.ones(1)}, tmp_path / "one.safetensors")
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"a": "one.safetensors"}}))
    with pytest.raises(FewbitsError, match=r"does not list tensor 'b' of one.safetensors; fetch both again"):
        open_source(tmp_path)


def test_a_tensor_in_two_shards_is_refused(tmp_path: Path) -> None:
    save_file({"a": torch.ones(1)}, tmp_path / "one.safetensors")
    save_file({"a": torch.ones(1), "b": torch.ones(1)}, tmp_path / "two.safetensors")
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"a": "one.safetensors", "b": "two.safetensors"}}))
    with pytest.raises(FewbitsError, match=r"tensor 'a' is in one.safetensors and in two.safetensors"):
        open_source(tmp_path)


@pytest.mark.parametrize(
    "shard", ["../a.safetensors", "/etc/passwd", "sub/a.safetensors", "..", "", "a\\b.safetensors", "a.bin", 3, None]
)
def test_a_shard_outside_the_folder_is_refused(tmp_path: Path, shard: Any) -> None:
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"a": shard}}))
    with pytest.raises(
        FewbitsError, match=r"index.json: tensor 'a' lies in .*, which is not the name of a .safetensors file beside"
    ):
        open_source(tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{]", r"index.json: byte 1: is not JSON \(.*\); fetch it again"),
        ("[" * 100_000, r"index.json: byte 0: is not JSON"),
        ("[]", r"index.json: has no weight_map from tensors to shards"),
        ('{"weight_map": {}}', r"index.json: has no weight_map from tensors to shards"),
    ],
)
def test_an_index_that_is_none_is_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / INDEX).write_text(text)
    with pytest.raises(FewbitsError, match=message):
        open_source(tmp_path)


@pytest.mark.parametrize(
    ("file", "message"),
    [
        (
            None,
            r"holds no weights \(model.safetensors or model.safetensors.index.json\); give a folder with safetensors",
        ),
        ("m.gguf", r"holds no weights .*; give the GGUF file itself: .*m.gguf"),
        (
            "consolidated.00.pth",
            r"consolidated.00.pth is there, but pickles are read as pytorch_model.bin, or as shards that",
        ),
        ("model-00001-of-00002.safetensors", r"model-00001-of-00002.safetensors is there, but no index: fetch"),
    ],
)
def test_a_folder_without_weights_says_what_it_holds(tmp_path: Path, file: str | None, message: str) -> None:
    if file:
        (tmp_path / file).write_bytes(b"")
    with pytest.raises(FewbitsError, match=message):
        open_source(tmp_path)


def test_weights_without_tensors_are_refused(tmp_path: Path) -> None:
    save_file({}, tmp_path / SINGLE)
    with pytest.raises(FewbitsError, match=r"its weights hold no tensor; fetch the model again"):
        open_source(tmp_path)


def test_a_missing_config_is_named(tmp_path: Path) -> None:
    save_file({"a": torch.ones(1)}, tmp_path / SINGLE)
    with pytest.raises(FewbitsError, match=r"has no config.json; copy it from where the weights came from"):
        _ = open_source(tmp_path).config


@pytest.mark.parametrize("text", ["{]", "{}", '{"model_type": "no-such-model"}', "[]"])
def test_a_config_that_transformers_does_not_read_is_refused(tmp_path: Path, text: str) -> None:
    save_file({"a": torch.ones(1)}, tmp_path / SINGLE)
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(FewbitsError, match=r"transformers cannot read its config.json: ") as caught:
        _ = open_source(tmp_path).config
    assert "\n" not in str(caught.value)


def test_a_config_that_asks_for_remote_code_is_refused(tmp_path: Path) -> None:
    save_file({"a": torch.ones(1)}, tmp_path / SINGLE)
    (tmp_path / "code.py").write_text("raise SystemExit('ran')")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "mine", "auto_map": {"AutoConfig": "code.Config"}}))
    message = r"its config.json asks for code of the model's own to be run, .*, pass trust_remote_code=True"
    with pytest.raises(FewbitsError, match=message) as caught:
        _ = open_source(tmp_path).config
    assert "\n" not in str(caught.value)


REMOTE = """
from transformers import PreTrainedConfig
class Config(PreTrainedConfig):
    model_type = "mine"
    ran = True
"""


def test_remote_code_that_is_trusted_is_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    save_file({"a": torch.ones(1)}, tmp_path / SINGLE)
    (tmp_path / "code.py").write_text(REMOTE)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "mine", "auto_map": {"AutoConfig": "code.Config"}}))
    assert open_source(tmp_path, trust_remote_code=True).config.ran


def test_a_tokenizer_that_asks_for_remote_code_is_refused(tmp_path: Path) -> None:
    save_model(tmp_path)
    (tmp_path / "code.py").write_text("raise SystemExit('ran')")
    asks = {"tokenizer_class": "Mine", "auto_map": {"AutoTokenizer": ["code.Mine", None]}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(asks))
    with pytest.raises(FewbitsError, match=r"its tokenizer asks for code of the model's own .* trust_remote_code=True"):
        open_source(tmp_path).tokenizer()


def test_a_folder_without_tokenizer_is_refused(tmp_path: Path) -> None:
    save_model(tmp_path)
    with pytest.raises(FewbitsError, match=r"transformers cannot read its tokenizer: "):
        open_source(tmp_path).tokenizer()


def test_reading_what_is_not_there_is_refused(tmp_path: Path) -> None:
    save_file({"a": torch.ones(3), "scalar": torch.tensor(1.0)}, tmp_path / SINGLE)
    source = open_source(tmp_path)
    with pytest.raises(FewbitsError, match=r"has no tensor 'b'"):
        source.read("b")
    with pytest.raises(FewbitsError, match=r"rows 2 to 4 of a do not exist: it has 3"):
        source.read_rows("a", 2, 4)
    with pytest.raises(FewbitsError, match=r"rows 0 to 1 of scalar do not exist: it has 0"):
        source.read_rows("scalar", 0, 1)


def test_a_file_that_is_cut_off_after_opening_is_noticed(tmp_path: Path) -> None:
    save_file({"a": torch.ones(300)}, tmp_path / SINGLE)
    source = open_source(tmp_path)
    with (tmp_path / SINGLE).open("r+b") as file:
        file.truncate(source.size - 8)
    with pytest.raises(FewbitsError, match=rf"ends inside tensor 'a' at byte {source.size - 8}; it was cut off"):
        source.read("a")


TINY = save({"weight": torch.ones(3, 4), "bias": torch.zeros(4, dtype=torch.int8)}, {"format": "pt"})


@settings(max_examples=1000, deadline=None)
@given(
    changes=st.lists(st.tuples(st.integers(0, len(TINY) - 1), st.integers(0, 255)), max_size=4),
    length=st.integers(0, len(TINY)),
)
def test_fuzz_file(tmp_path_factory: pytest.TempPathFactory, changes: list[tuple[int, int]], length: int) -> None:
    data = bytearray(TINY)
    for place, byte in changes:
        data[place] = byte
    path = tmp_path_factory.getbasetemp() / "fuzzed.safetensors"
    path.write_bytes(data[:length])
    try:
        tensors = read_safetensors_header(path)
    except FewbitsError as error:
        if not str(error).startswith(f"{path}: "):
            raise
    else:
        assert length == len(TINY)
        assert sum(tensor.nbytes for tensor in tensors.values()) <= length
