"""Weights in pickles: read as safetensors are, one tensor at a time, and never run."""

import io
import json
import os
import pickle
import shutil
import subprocess
import sys
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import fewbits
from fewbits.errors import FewbitsError
from fewbits.models.safetensors_header import DTYPES
from fewbits.models.source import StoredTensor, open_source
from fewbits.models.torch_folder import INDEX, SINGLE

ARCHIVE, OLD = True, False


def save(folder: Path, what: Any, *, archive: bool = ARCHIVE, name: str = SINGLE) -> None:
    torch.save(what, folder / name, _use_new_zipfile_serialization=archive)


def pickled(tiny: Path, folder: Path, *, archive: bool = ARCHIVE) -> Path:
    """The tiny model with its weights in a pickle."""
    shutil.copytree(tiny, folder)
    (folder / "model.safetensors").unlink()
    save(folder, load_file(tiny / "model.safetensors"), archive=archive)
    return folder


@pytest.mark.parametrize("archive", [ARCHIVE, OLD], ids=["archive", "old"])
def test_a_model_is_the_same_as_from_safetensors(tiny: Path, tmp_path: Path, archive: bool) -> None:
    source = open_source(pickled(tiny, tmp_path / "model", archive=archive))
    expected = load_file(tiny / "model.safetensors")
    assert source.size == (tmp_path / "model" / SINGLE).stat().st_size
    assert source.config.model_type == "llama"
    assert source.tokenizer()("hello") == open_source(tiny).tokenizer()("hello")
    assert source.generation_config() == open_source(tiny).generation_config()
    assert source.tensors.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(source.read(name), tensor), name
        assert torch.equal(source.read_rows(name, 3, 17), tensor[3:17]), name
        assert source.tensors[name] == StoredTensor(name, tuple(tensor.shape), "BF16", 2 * tensor.numel())
    done = fewbits.convert(tmp_path / "model", tmp_path / "int8").path
    written = load_file(done / "model.safetensors")
    assert all(torch.equal(tensor, written[name]) for name, tensor in converted(tiny, tmp_path).items())


def converted(tiny: Path, tmp_path: Path) -> dict[str, torch.Tensor]:
    return load_file(fewbits.convert(tiny, tmp_path / "expected").path / "model.safetensors")


def test_shards(tmp_path: Path) -> None:
    save(tmp_path, {"a": torch.ones(3), "b": torch.zeros(2)}, name="pytorch_model-00001-of-00002.bin")
    save(tmp_path, {"c": torch.arange(4)}, name="pytorch_model-00002-of-00002.bin", archive=OLD)
    index = {name: f"pytorch_model-0000{1 + (name == 'c')}-of-00002.bin" for name in "abc"}
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": index}))
    source = open_source(tmp_path)
    assert list(source.tensors) == ["a", "b", "c"]
    assert [source.read(name).tolist() for name in "acb"] == [[1, 1, 1], [0, 1, 2, 3], [0, 0]]


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=str)
@pytest.mark.parametrize("shape", [(), (0,), (5,), (2, 0, 3)], ids=str)
def test_every_dtype_and_shape(tmp_path: Path, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    tensor = torch.zeros(shape, dtype=torch.uint8).to(dtype)
    if tensor.numel():
        tensor.view(-1).view(torch.uint8)[:] = torch.arange(tensor.nbytes) % 2
    save(tmp_path, {"t": tensor})
    read = open_source(tmp_path).read("t")
    assert (read.dtype, read.shape) == (dtype, tensor.shape)
    assert read.untyped_storage().tolist() == tensor.untyped_storage().tolist()


@pytest.mark.parametrize("archive", [ARCHIVE, OLD], ids=["archive", "old"])
def test_views_parameters_and_what_is_shared(tmp_path: Path, archive: bool) -> None:
    base = torch.arange(24.0).reshape(4, 6)
    tensors = {
        "transposed": base.t(),
        "tied": base,
        "again": base,
        "part": base[1:3, 2:4],
        "steps": base[::2, ::3],
        "repeated": torch.tensor([[7.0], [8.0]]).expand(2, 5),
        "row": base[2],
        "parameter": torch.nn.Parameter(torch.ones(3, 2)),
        "scalar": torch.tensor(3),
    }
    save(tmp_path, tensors, archive=archive)
    source = open_source(tmp_path)
    assert source.tensors.keys() == tensors.keys()
    for name, tensor in tensors.items():
        read = source.read(name)
        assert torch.equal(read, tensor), name
        assert read.is_contiguous()
        assert not read.requires_grad
        assert read.untyped_storage().nbytes() == read.nbytes == source.tensors[name].nbytes, "it holds nothing else"
        read.zero_()
        assert torch.equal(source.read(name), tensor), "what was read before is not what is read again"
        if tensor.ndim:
            assert torch.equal(source.read_rows(name, 1, 2), tensor[1:2]), name
            assert source.read_rows(name, 1, 1).shape == (0, *tensor.shape[1:])


def test_rows_that_do_not_exist(tmp_path: Path) -> None:
    save(tmp_path, {"a": torch.ones(3)})
    with pytest.raises(FewbitsError, match=r"rows 2 to 4 of a do not exist: it has 3"):
        open_source(tmp_path).read_rows("a", 2, 4)
    with pytest.raises(FewbitsError, match=r"has no tensor 'b'"):
        open_source(tmp_path).read("b")


@pytest.mark.parametrize("key", ["state_dict", "model", "module"])
def test_what_a_training_script_wraps_around_the_tensors_is_taken_off(tmp_path: Path, key: str) -> None:
    optimizer = {"state": {0: {"exp_avg": torch.ones(2)}}, "param_groups": [{"lr": 0.1}]}
    save(tmp_path, {key: OrderedDict(a=torch.ones(2), name="tiny"), "epoch": 3, "optimizer": optimizer})
    assert list(open_source(tmp_path).tensors) == ["a"]


def test_safetensors_are_preferred(tmp_path: Path) -> None:
    save(tmp_path, {"pickled": torch.ones(1)})
    save_file({"safe": torch.ones(1)}, tmp_path / "model.safetensors")
    assert list(open_source(tmp_path).tensors) == ["safe"]


# --- pickles that run code ----------------------------------------------------------------------------------------


class Payload:
    """A pickle of it calls a function when it is loaded."""

    def __init__(self, function: Callable[..., Any], *arguments: object) -> None:
        self.call = function, arguments

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[object, ...]]:
        return self.call


def payloads(target: Path) -> dict[str, Payload]:
    return {
        "posix.system": Payload(os.system, f"touch {target}"),
        "eval": Payload(eval, f"__import__('os').mkdir({str(target)!r})"),
        "exec": Payload(exec, f"import os; os.mkdir({str(target)!r})"),
        "os.mkdir": Payload(os.mkdir, os.fspath(target)),
        "subprocess.Popen": Payload(subprocess.Popen, ["touch", os.fspath(target)]),
        "torch.load": Payload(torch.load, os.fspath(target)),
    }


@pytest.mark.parametrize("how", ["archive", "old", "plain pickle", "protocol 4"])
@pytest.mark.parametrize("kind", payloads(Path()))
def test_a_pickle_that_would_run_code_does_not(tmp_path: Path, how: str, kind: str) -> None:
    model = tmp_path / "model"
    model.mkdir()
    payload = payloads(tmp_path / "ran")[kind]
    if how in ("plain pickle", "protocol 4"):
        (model / SINGLE).write_bytes(pickle.dumps(payload, protocol=4 if how == "protocol 4" else 2))
    else:
        save(model, {"weight": torch.ones(2), "bias": payload}, archive=how == "archive")
    if kind not in ("torch.load", "subprocess.Popen") and how != "protocol 4":
        load_unsafely(model / SINGLE, how)
        assert (tmp_path / "ran").exists(), "the payload is a real one"
        shutil.rmtree(tmp_path / "ran") if (tmp_path / "ran").is_dir() else (tmp_path / "ran").unlink()
    with pytest.raises(FewbitsError) as caught:
        open_source(model)
    message = str(caught.value)
    assert message.startswith(f"{model / SINGLE}: ")
    assert "\n" not in message
    assert "weights_only" not in message, "no advice to run it"
    if how in ("archive", "old"):
        assert "which builds no tensor and could run code; nothing of it was run. Take the model's safe" in message
    assert list(tmp_path.iterdir()) == [model]


def load_unsafely(path: Path, how: str) -> None:
    if how == "plain pickle":
        with path.open("rb") as file:
            pickle.load(file)
    else:
        torch.load(path, weights_only=False)


def test_the_function_that_a_pickle_asks_for_is_named(tmp_path: Path) -> None:
    save(tmp_path, {"a": Payload(os.system, "true")})
    with pytest.raises(FewbitsError, match=rf"{SINGLE}: this pickle asks for posix.system, which builds no tensor"):
        open_source(tmp_path)
    save(tmp_path, {"a": Payload(eval, "1")})
    with pytest.raises(FewbitsError, match="this pickle asks for eval, which builds no tensor"):
        open_source(tmp_path)


# --- refused ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ({}, "its weights hold no tensor"),
        ({"epoch": 3}, "its weights hold no tensor"),
        ([torch.ones(1)], "holds a list, not tensors by name; save the model's state_dict"),
        (torch.ones(1), "holds a Tensor, not tensors by name"),
        ({"a": torch.ones(1), "ema": {"a": torch.ones(1)}}, "entry 'ema' is a dict, and only tensors by name are read"),
        ({"a": torch.ones(1), "list": [{"x": torch.ones(1)}]}, "entry 'list' is a list, and only tensors by name"),
        ({"model": {"a": torch.ones(1)}, "state_dict": {"a": torch.ones(1)}}, "entry 'model' is a dict, and only"),
        ({3: torch.ones(1)}, "entry 3 is a Tensor, and only tensors by name are read"),
        ({"a": torch.ones(2).to_sparse()}, r"tensor 'a' is torch.sparse_coo, which is not read; save it as plain"),
        ({"a": torch.ones(2, dtype=torch.complex128)}, r"tensor 'a' is torch.complex128, which is not read"),
        ({"a": torch.ones(1).expand(10**9)}, r"tensor 'a' would be 4000000000 bytes, more than the whole file"),
    ],
    ids=str,
)
def test_what_holds_no_weights_is_refused(tmp_path: Path, what: Any, message: str) -> None:
    save(tmp_path, what)
    with pytest.raises(FewbitsError, match=message):
        open_source(tmp_path)


def test_a_container_that_holds_itself_is_left_out(tmp_path: Path) -> None:
    endless: list[Any] = []
    endless.append(endless)
    save(tmp_path, {"a": torch.ones(1), "endless": endless})
    assert list(open_source(tmp_path).tensors) == ["a"]


def test_a_program_is_refused(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / SINGLE, "w") as archive:
        archive.writestr("archive/constants.pkl", b"")
        archive.writestr("archive/data.pkl", pickle.dumps({}))
    with pytest.raises(FewbitsError, match="is a TorchScript program, not weights; save the model's state_dict"):
        open_source(tmp_path)


def rewritten(tmp_path: Path, change: Callable[[str, bytes], bytes], compression: int = zipfile.ZIP_STORED) -> Path:
    """A folder with an archive whose records were changed."""
    save(tmp_path, {"a": torch.arange(100.0)})
    with zipfile.ZipFile(tmp_path / SINGLE) as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(tmp_path / SINGLE, "w", compression) as archive:
        for name, data in records.items():
            archive.writestr(name, change(name, data))
    return tmp_path


def test_a_storage_that_is_shorter_than_its_tensor_is_refused(tmp_path: Path) -> None:
    folder = rewritten(tmp_path, lambda name, data: data[:396] if name.endswith("data/0") else data)
    with pytest.raises(
        FewbitsError, match=r"tensor 'a' lies outside of the bytes stored for it; the file is truncated"
    ):
        open_source(folder)


def test_compressed_storages_are_refused(tmp_path: Path) -> None:
    folder = rewritten(tmp_path, lambda _, data: data, zipfile.ZIP_DEFLATED)
    with pytest.raises(FewbitsError, match=r"data/0 is compressed, as torch.save never does"):
        open_source(folder)


@pytest.mark.parametrize("data", [b"", b"PK\3\4", b"\x80\x02.", b"garbage" * 100], ids=str)
def test_what_is_no_pickle_is_refused(tmp_path: Path, data: bytes) -> None:
    (tmp_path / SINGLE).write_bytes(data)
    with pytest.raises(FewbitsError, match=rf"^{tmp_path / SINGLE}: .*; the file is truncated or corrupt: fetch"):
        open_source(tmp_path)


def test_a_file_that_is_cut_off_after_opening_is_noticed(tmp_path: Path) -> None:
    save(tmp_path, {"a": torch.ones(3000)})
    source = open_source(tmp_path)
    with (tmp_path / SINGLE).open("r+b") as file:
        file.truncate(5000)
    with pytest.raises(FewbitsError, match=r"ends inside tensor 'a' at byte 5000; it was cut off"):
        source.read("a")


@pytest.mark.parametrize("shard", ["../a.bin", "/etc/passwd", "sub/a.bin", "a.safetensors", "", None])
def test_a_shard_outside_the_folder_is_refused(tmp_path: Path, shard: Any) -> None:
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"a": shard}}))
    with pytest.raises(FewbitsError, match=r"tensor 'a' lies in .*, which is not the name of a .bin file beside it"):
        open_source(tmp_path)


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"a": "gone.bin"}}))
    with pytest.raises(FewbitsError, match=rf"{INDEX}: names the shard 'gone.bin', which is missing: fetch it"):
        open_source(tmp_path)


def saved(archive: bool) -> bytes:
    buffer = io.BytesIO()
    torch.save({"weight": torch.ones(3, 4), "bias": torch.zeros(4)}, buffer, _use_new_zipfile_serialization=archive)
    return buffer.getvalue()


@settings(max_examples=500, deadline=None)
@given(
    changes=st.lists(st.tuples(st.floats(0, 1), st.integers(0, 255)), max_size=4),
    length=st.one_of(st.just(1.0), st.floats(0, 1)),
    archive=st.booleans(),
)
@example(changes=[(0.9765625, 1)], length=1.0, archive=True)  # a record before the beginning of the file
def test_fuzz_file(
    tmp_path_factory: pytest.TempPathFactory, changes: list[tuple[float, int]], length: float, archive: bool
) -> None:
    data = bytearray(saved(archive))
    for place, byte in changes:
        data[int(place * (len(data) - 1))] = byte
    folder = tmp_path_factory.getbasetemp() / "fuzzed"
    folder.mkdir(exist_ok=True)
    (folder / SINGLE).write_bytes(data[: int(length * len(data))])
    try:
        source = open_source(folder)
        for name, stored in source.tensors.items():
            assert source.read(name).shape == stored.shape
    except FewbitsError as error:
        if not str(error).startswith(str(folder)):
            raise


# --- memory -------------------------------------------------------------------------------------------------------

# Read every tensor of a folder, one after another; print by how many kilobytes the peak grew.
MEASURE = """
import sys
from pathlib import Path
import torch
from fewbits.models.source import open_source
small, big = sys.argv[1:]
def kilobytes(key):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(key))
open_source(small).read("0")  # so that what is imported and built once is not counted
Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
before = kilobytes("VmRSS")
source = open_source(big)
for name in source.tensors:
    assert source.read(name)[-1] == int(name)
print(kilobytes("VmHWM") - before)
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's /proc to measure memory")
def test_one_tensor_is_in_memory_at_a_time(tmp_path: Path) -> None:
    for folder, elements in {"small": 10, "big": 2_000_000}.items():
        (tmp_path / folder).mkdir()
        save(tmp_path / folder, {str(n): torch.full((elements,), float(n)) for n in range(25)})
    assert (tmp_path / "big" / SINGLE).stat().st_size >= 200e6
    command = [sys.executable, "-c", MEASURE, tmp_path / "small", tmp_path / "big"]
    grown = 1024 * int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    # A tensor is 8 MB, and all are 200. The allocator may keep a few that were freed: 29 MB were seen once.
    assert grown < 40e6
