"""A calibration that was interrupted goes on at the block where it was, and gives the same bits."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import fewbits

TEXT = "\n".join(f"hello {n} hell {n * n} 漢 don't he'll {n % 7}" for n in range(500))
BLOCKS = 4


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory, save_tiny: Callable[..., Any]) -> Path:
    folder = tmp_path_factory.mktemp("deep") / "model"
    save_tiny(folder, num_hidden_layers=BLOCKS)
    return folder


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(TEXT)
    return path


class Interrupting:
    """Tells of blocks, and is Ctrl-C when it hears of one of them."""

    def __init__(self, at: int | None = None) -> None:
        self.heard: list[int] = []
        self.at = at

    def __call__(self, done: int, blocks: int) -> None:
        self.heard.append(done)
        if done == self.at:
            raise KeyboardInterrupt


def convert(deep: Path, out: Path, text: Path, on_block: Interrupting) -> bytes:
    folder = fewbits.convert(deep, out, "int4", calibrate=text, on_block=on_block).path
    assert not list(folder.glob(".*"))  # nothing of the work is left
    return (folder / "model.safetensors").read_bytes()


def interrupted(deep: Path, out: Path, text: Path, at: int) -> Path:
    with pytest.raises(KeyboardInterrupt) as stop:
        convert(deep, out, text, Interrupting(at))
    assert "run the same again, and it goes on there" in stop.value.__notes__[0]
    assert not out.exists()
    return out.with_name(f".{out.name}.incomplete")


@pytest.mark.parametrize("at", [2, 3, 4])
def test_it_goes_on_at_the_block_where_it_was(deep: Path, tmp_path: Path, text: Path, at: int) -> None:
    whole = convert(deep, tmp_path / "whole", text, Interrupting())
    staging = interrupted(deep, tmp_path / "out", text, at)
    # What is kept is one block's inputs, or two where the next block was just done.
    assert 1 <= len(list(staging.glob(".calibration-*"))) <= 2
    again = Interrupting()
    assert convert(deep, tmp_path / "out", text, again) == whole
    assert again.heard == list(range(at, BLOCKS + 1))


def test_inputs_that_cannot_be_read_are_made_again(deep: Path, tmp_path: Path, text: Path) -> None:
    whole = convert(deep, tmp_path / "whole", text, Interrupting())
    staging = interrupted(deep, tmp_path / "out", text, 3)
    for kept in staging.glob(".calibration-*"):
        kept.write_bytes(b"no tensors")
    again = Interrupting()
    assert convert(deep, tmp_path / "out", text, again) == whole
    assert again.heard == list(range(1, BLOCKS + 1))


def test_another_text_begins_anew(deep: Path, tmp_path: Path, text: Path) -> None:
    interrupted(deep, tmp_path / "out", text, 3)
    other = tmp_path / "other.txt"
    other.write_text(TEXT[::-1])
    again = Interrupting()
    convert(deep, tmp_path / "out", other, again)
    assert again.heard == list(range(1, BLOCKS + 1))
