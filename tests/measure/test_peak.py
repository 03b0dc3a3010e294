import sys
from pathlib import Path

import pytest
import torch

from fewbits.measure import peak
from fewbits.measure.peak import PeakMemory

MIB = 2**20


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux lets a process begin its peak anew")
def test_the_peak_is_what_was_held_at_once_while_it_ran() -> None:
    memory = PeakMemory()
    loading = torch.ones(192 * MIB, dtype=torch.uint8)  # freed before the run: not its peak
    del loading
    weights = torch.ones(64 * MIB, dtype=torch.uint8)
    assert memory.restart()
    activations = torch.ones(32 * MIB, dtype=torch.uint8)
    del activations
    assert 90 * MIB < memory.grown() < 112 * MIB
    assert weights.all()


def test_where_the_system_has_no_such_thing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(peak, "_CLEAR_REFS", tmp_path / "absent/clear_refs")
    assert not PeakMemory().restart()
