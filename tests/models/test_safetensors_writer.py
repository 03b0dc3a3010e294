import errno
import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from fewbits.errors import FewbitsError
from fewbits.models.safetensors_header import DTYPES
from fewbits.models.safetensors_writer import SafetensorsWriter

TENSORS = {
    "codes": torch.arange(15, dtype=torch.int8).reshape(3, 5),
    "scale": torch.tensor([[0.5], [1.5], [2.5]]),
    "bias": torch.tensor([1.0, 2.0, 3.0], dtype=torch.bfloat16),
    "step": torch.tensor(7, dtype=torch.int64),
    "é漢": torch.zeros(0, 4),
}


def declared(tensors: dict[str, torch.Tensor] = TENSORS) -> list[tuple[str, torch.dtype, tuple[int, ...]]]:
    return [(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()]


@pytest.mark.parametrize("order", [list(TENSORS), list(reversed(TENSORS))], ids=["declared order", "reversed"])
def test_the_safetensors_package_reads_what_was_written(tmp_path: Path, order: list[str]) -> None:
    with SafetensorsWriter(tmp_path / "out.safetensors", declared()) as writer:
        for name in order:
            writer.write(name, TENSORS[name])
    loaded = load_file(tmp_path / "out.safetensors")
    assert loaded.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert loaded[name].dtype == tensor.dtype
        assert torch.equal(loaded[name], tensor)
    with safe_open(tmp_path / "out.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=str)
def test_every_dtype(tmp_path: Path, dtype: torch.dtype) -> None:
    tensor = torch.ones(3, dtype=torch.uint8).to(dtype)
    with SafetensorsWriter(tmp_path / "out.safetensors", [("t", dtype, (3,))]) as writer:
        writer.write("t", tensor)
    loaded = load_file(tmp_path / "out.safetensors")["t"]
    assert loaded.dtype == dtype
    assert loaded.untyped_storage().tolist() == tensor.untyped_storage().tolist()


def test_data_is_aligned_to_its_elements(tmp_path: Path) -> None:
    path = tmp_path / "out.safetensors"
    with SafetensorsWriter(path, declared()) as writer:
        for name, tensor in TENSORS.items():
            writer.write(name, tensor)
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    assert length % 8 == 0
    header = json.loads(data[8 : 8 + length])
    for name, tensor in TENSORS.items():
        assert header[name]["data_offsets"][0] % tensor.dtype.itemsize == 0


def test_a_view_is_written_as_its_elements(tmp_path: Path) -> None:
    base = torch.arange(12.0).reshape(3, 4)
    with SafetensorsWriter(tmp_path / "out.safetensors", [("t", torch.float32, (4, 3))]) as writer:
        writer.write("t", base.t().requires_grad_())
    assert torch.equal(load_file(tmp_path / "out.safetensors")["t"], base.t())


def test_a_tensor_must_be_what_was_declared(tmp_path: Path) -> None:
    path = tmp_path / "out.safetensors"
    with SafetensorsWriter(path, [("t", torch.float32, (2,))]) as writer:
        message = r"tensor 't' was declared torch.float32 \[2\], but is torch.float16 \[2\]"
        with pytest.raises(FewbitsError, match=message):
            writer.write("t", torch.ones(2, dtype=torch.float16))
        with pytest.raises(FewbitsError, match=r"but is torch.float32 \[2, 1\]"):
            writer.write("t", torch.ones(2, 1))
        with pytest.raises(FewbitsError, match=r"tensor 'u' was not declared"):
            writer.write("u", torch.ones(2))
        writer.write("t", torch.ones(2))
        with pytest.raises(FewbitsError, match=r"tensor 't' was written already"):
            writer.write("t", torch.ones(2))
    assert torch.equal(load_file(path)["t"], torch.ones(2))


def test_a_tensor_that_never_came_is_named_and_the_file_removed(tmp_path: Path) -> None:
    path = tmp_path / "out.safetensors"
    with (
        pytest.raises(FewbitsError, match=r"out.safetensors: tensor 'scale' was declared but never written"),
        SafetensorsWriter(path, declared()) as writer,
    ):
        writer.write("codes", TENSORS["codes"])
    assert not path.exists()


def interrupt(writer: SafetensorsWriter, error: BaseException) -> None:
    with writer:
        writer.write("codes", TENSORS["codes"])
        raise error


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(errno.ENOSPC, "No space left on device")], ids=repr)
def test_nothing_is_left_when_the_block_raises(tmp_path: Path, error: BaseException) -> None:
    path = tmp_path / "out.safetensors"
    with pytest.raises(type(error)):
        interrupt(SafetensorsWriter(path, declared()), error)
    assert not path.exists()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_is_an_oserror(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    full = Path("/dev/full").open("wb", buffering=0)  # noqa: SIM115
    monkeypatch.setattr(Path, "open", lambda *_args, **_options: full)
    with pytest.raises(OSError, match="No space left"), SafetensorsWriter(tmp_path / "out", declared()):
        pass


def test_a_file_that_exists_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "out.safetensors"
    path.write_text("mine")
    with pytest.raises(FewbitsError, match=r"exists already; remove it"), SafetensorsWriter(path, declared()):
        pass
    assert path.read_text() == "mine"


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ([("t", torch.int8, (1,)), ("t", torch.int8, (2,))], r"tensor 't' cannot be declared twice"),
        ([("__metadata__", torch.int8, (1,))], r"nor be named __metadata__"),
        ([("t", torch.complex128, (1,))], r"tensor 't' is torch.complex128, which safetensors cannot hold; cast it"),
    ],
)
def test_a_declaration_that_cannot_be_written_is_refused(
    tmp_path: Path, tensors: list[tuple[str, torch.dtype, tuple[int, ...]]], message: str
) -> None:
    with pytest.raises(FewbitsError, match=message):
        SafetensorsWriter(tmp_path / "out.safetensors", tensors)
    assert not (tmp_path / "out.safetensors").exists()
