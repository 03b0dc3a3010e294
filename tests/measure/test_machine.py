import json
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch

import fewbits
from fewbits.kernels import native
from fewbits.measure import machine
from fewbits.measure.machine import this_machine


@pytest.fixture(autouse=True)
def kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "status", lambda: SimpleNamespace(isa="avx2", reason="the widest this CPU has"))


def test_says_what_a_figure_depends_on() -> None:
    found = this_machine()
    assert found.versions["fewbits"] == fewbits.__version__
    assert found.versions["torch"] == torch.__version__
    assert found.threads == torch.get_num_threads()
    assert found.cores >= 1
    assert 0 < found.available_bytes <= found.memory_bytes <= psutil.virtual_memory().total
    assert found.cpu
    assert (found.isa, found.isa_reason) == ("avx2", "the widest this CPU has")


def test_json_is_plain(monkeypatch: pytest.MonkeyPatch) -> None:
    properties = SimpleNamespace(name="H100", total_memory=80 << 30, major=9, minor=0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
    plain = this_machine().to_json()
    assert json.loads(json.dumps(plain)) == plain
    assert plain["gpus"] == [{"name": "H100", "memory_bytes": 80 << 30, "capability": "9.0"}]


def test_a_package_that_is_absent_is_said_to_be(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "_PACKAGES", ("no-such-package",))
    assert this_machine().versions["no-such-package"] == "not installed"


@pytest.mark.parametrize(("limit", "expected"), [("1073741824\n", (1 << 30, 4096)), ("max\n", (0, 0)), (None, (0, 0))])
def test_a_containers_limit_is_read(tmp_path: Path, limit: str | None, expected: tuple[int, int]) -> None:
    if limit is not None:
        (tmp_path / "memory.max").write_text(limit)
        (tmp_path / "memory.current").write_text("4096\n")
    assert machine._container_memory(tmp_path) == expected


def test_a_containers_limit_bounds_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "_container_memory", lambda: (1 << 30, 1 << 29))
    found = this_machine()
    assert found.memory_bytes == 1 << 30
    assert found.available_bytes <= 1 << 29
