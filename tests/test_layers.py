"""The import order: nothing imports from its right. formats come first, the command line last."""

import ast
import sys
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src/fewbits"
# Layers in one set do not know each other.
ORDER = [{"errors"}, {"formats"}, {"kernels"}, {"tensors"}, {"models"}, {"quantize", "train"}, {"measure"},
         {"report"}, {"cli"}]  # fmt: skip
RANK = {layer: rank for rank, layers in enumerate(ORDER) for layer in layers}


def imports(code: str) -> set[str]:
    """Full names of all that is imported, inside functions too, but not under TYPE_CHECKING."""
    tree = ast.parse(code)
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            node.body = []
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, "imports are absolute"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def violations(layer: str, code: str) -> list[str]:
    """What code of a layer may not import, and does."""
    found = []
    for name in imports(code):
        package, other = (*name.split("."), "")[:2]
        if package == "fewbits":
            wrong = other not in RANK or (other != layer and RANK[other] >= RANK[layer])
        elif layer in ("errors", "formats"):
            wrong = package not in sys.stdlib_module_names
        else:
            wrong = layer == "report" and package in ("torch", "transformers", "numpy")
        found += [name] if wrong else []
    return found


MODULES = [path for path in sorted(SOURCE.rglob("*.py")) if path.parent != SOURCE or path.stem != "__init__"]


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_a_module_imports_from_its_left_only(path: Path) -> None:
    layer = path.relative_to(SOURCE).with_suffix("").parts[0]
    assert layer in RANK, f"the layer {layer} has no place in the order"
    assert violations(layer, path.read_text()) == []


@pytest.mark.parametrize(
    ("layer", "code"),
    [
        ("formats", "import numpy as np"),
        ("formats", "from fewbits.kernels.ops import quantize_per_token"),
        ("tensors", "def f():\n    from fewbits.models import load"),
        ("tensors", "import fewbits.models"),
        ("quantize", "from fewbits.train import recipe"),
        ("train", "from fewbits.quantize.convert import convert"),
        ("report", "import torch.nn"),
        ("models", "from fewbits import convert"),
        ("kernels", "import fewbits"),
        ("measure", "from fewbits.surprise import thing"),
        ("models", "if TYPE_CHECKING:\n    pass\nelse:\n    import fewbits.cli"),
    ],
)
def test_a_violation_is_seen(layer: str, code: str) -> None:
    assert len(violations(layer, code)) == 1


@pytest.mark.parametrize(
    ("layer", "code"),
    [
        ("formats", "import math\nfrom fewbits.errors import FewbitsError"),
        ("cli", "from fewbits.report.terminal import manifest_table\nimport typer"),
        ("models", "from fewbits.models.source import Source\nimport torch"),
        ("report", "if TYPE_CHECKING:\n    import torch\n    from fewbits.cli import app"),
    ],
)
def test_what_is_allowed_is_not_reported(layer: str, code: str) -> None:
    assert violations(layer, code) == []
