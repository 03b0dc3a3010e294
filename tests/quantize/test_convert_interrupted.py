"""A conversion that does not end leaves nothing that looks like a model, whatever stops it; see also `_resumed`."""

import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file

import fewbits
from fewbits.models.safetensors_writer import SafetensorsWriter

# The command line, with time to stop it after each tensor.
SLOWLY = """
import time
from fewbits.models.safetensors_writer import SafetensorsWriter
write = SafetensorsWriter.write
def slow_write(self, name, tensor):
    write(self, name, tensor)
    print("wrote", name, flush=True)
    time.sleep(0.5)
SafetensorsWriter.write = slow_write
from fewbits.cli import main
main()
"""
# The command line, where no file may grow over 50 kB, as on a disk that is full.
NO_SPACE = """
import resource
resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
from fewbits.cli import main
main()
"""


def stop(tiny: Path, out: Path, how: signal.Signals) -> tuple[int, str]:
    """Start a conversion, stop it in the middle; its exit code and what it wrote to stderr."""
    command = [sys.executable, "-c", SLOWLY, "convert", tiny, out]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True) as process:
        for line in process.stdout:
            if line.startswith("wrote model.layers.0.mlp"):
                break
        assert list(out.parent.glob(".*.incomplete/*.safetensors")), "the conversion was not under way"
        process.send_signal(how)
        _, err = process.communicate(timeout=60)
    return process.returncode, err


def test_ctrl_c(tiny: Path, tmp_path: Path) -> None:
    kept = "what is done is kept: run the same again, and it goes on there"
    assert stop(tiny, tmp_path / "out", signal.SIGINT) == (130, f"error: interrupted; {kept}\n")
    assert [path.name for path in tmp_path.iterdir()] == [".out.incomplete"]
    fewbits.convert(tiny, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_killed_conversion_is_marked_and_replaced(tiny: Path, tmp_path: Path) -> None:
    assert stop(tiny, tmp_path / "out", signal.SIGKILL)[0] == -signal.SIGKILL
    assert [path.name for path in tmp_path.iterdir()] == [".out.incomplete"]
    (tmp_path / ".out.incomplete/stale").touch()
    fewbits.convert(tiny, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert not (tmp_path / "out/stale").exists()
    assert load_file(tmp_path / "out/model.safetensors")


def test_a_full_disk(tiny: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-c", NO_SPACE, "convert", tiny, tmp_path / "out"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr == f"error: [Errno 27] File too large: '{tmp_path / 'out'}'\n"
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_will_be_full(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=100_000))
    with pytest.raises(fewbits.FewbitsError, match=r"0.00 GB are needed and 0.00 GB are free on its disk; free some"):
        fewbits.convert(tiny, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, fewbits.FewbitsError, OSError])
@pytest.mark.parametrize("at", ["model.layers.1.mlp.up_proj.weight", "tokenizer"])
def test_an_error_in_the_middle(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: type[BaseException], at: str
) -> None:
    write = SafetensorsWriter.write

    def fail(self: SafetensorsWriter, name: str, tensor: object) -> None:
        if name == at:
            raise error("no further")
        write(self, name, tensor)

    def fail_tokenizer(*_: object, **__: object) -> None:
        raise error("no further")

    monkeypatch.setattr(SafetensorsWriter, "write", fail)
    if at == "tokenizer":
        monkeypatch.setattr("transformers.PreTrainedTokenizerFast.save_pretrained", fail_tokenizer)
        monkeypatch.setattr("transformers.PreTrainedTokenizerBase.save_pretrained", fail_tokenizer)
    out = shutil.copytree(tiny, tmp_path / "out")
    before = (out / "model.safetensors").read_bytes()
    with pytest.raises(error, match="no further"):
        fewbits.convert(tiny, out, overwrite=True)
    kept = [".out.incomplete"] if error is KeyboardInterrupt else []  # what was done until then
    assert sorted(path.name for path in tmp_path.iterdir()) == [*kept, "out"]
    assert (out / "model.safetensors").read_bytes() == before, "the old model still stands"


def test_a_model_is_converted_in_its_own_place(save_tiny: Callable, tmp_path: Path) -> None:
    save_tiny(tmp_path / "model")
    fewbits.convert(tmp_path / "model", tmp_path / "model", overwrite=True)
    fewbits.AutoModelForCausalLM.from_pretrained(tmp_path / "model", precision="int8")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
