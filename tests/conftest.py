"""Tiny models with random weights in folders and GGUF files, and the command line run in this process."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import transformers

import fewbits
from models.tiny_gguf import TinyGguf, tiny_config


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what needs a CUDA GPU where there is none."""
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("cuda"):
                item.add_marker(pytest.mark.skip(reason="torch finds no CUDA GPU on this machine"))


class Ran(NamedTuple):
    """How a command ended, and what it wrote."""

    code: int
    out: str
    err: str


def save_tiny(
    folder: Path, architecture: str = "llama", *, dtype: torch.dtype = torch.bfloat16, **changes: Any
) -> transformers.PreTrainedModel:
    """Write a tiny model with its tokenizer, as transformers does; biases and norms are random too."""
    torch.manual_seed(0)
    # 0.2: logits that differ; at the usual 0.02 every prediction is nearly uniform.
    changes = {"initializer_range": 0.2, "bos_token_id": 259, "eos_token_id": 258} | changes
    config = tiny_config(architecture, **changes)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for parameter in model.parameters():
        if parameter.ndim == 1:
            torch.nn.init.normal_(parameter, 1 if parameter.min() == 1 else 0, 0.3)
    model = model.to(dtype).eval()
    model.save_pretrained(folder)
    TinyGguf().write(folder / "tokenizer.gguf")
    fewbits.AutoTokenizer.from_pretrained(folder / "tokenizer.gguf").save_pretrained(folder)
    (folder / "tokenizer.gguf").unlink()
    return model


@pytest.fixture(scope="session", name="save_tiny")
def save_tiny_fixture() -> Callable[..., transformers.PreTrainedModel]:
    return save_tiny


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama in bfloat16 with an output head of its own; do not change it."""
    folder = tmp_path_factory.mktemp("tiny") / "tiny"
    save_tiny(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_int8(tiny: Path) -> Path:
    """The same, converted to int8; do not change it."""
    return fewbits.convert(tiny, tiny.with_name("tiny-int8")).path


@pytest.fixture
def run_cli(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Ran]:
    """Run the command line with these arguments, in this process."""
    from fewbits.cli import main

    def run(*arguments: object) -> Ran:
        monkeypatch.setattr(sys, "argv", ["fewbits", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main()
        assert isinstance(ended.value.code, int)
        return Ran(ended.value.code, *capsys.readouterr())

    return run
