"""Tiny models of each family, saved once."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tiny_families import write_family


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """The folder of a family's model; do not change it."""
    folders: dict[tuple[str, torch.dtype], Path] = {}

    def folder_of(name: str, dtype: torch.dtype = torch.float32) -> Path:
        if (name, dtype) not in folders:
            folders[name, dtype] = tmp_path_factory.mktemp("family") / name
            write_family(name, folders[name, dtype], dtype=dtype)
        return folders[name, dtype]

    return folder_of
