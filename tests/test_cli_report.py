"""`fewbits compare --report`: the page, and what is refused before any work."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("A number format says which numbers there are. " * 40)
    return path


def test_the_page_is_written(
    run_cli: Callable[..., Any], tiny: Path, tiny_int8: Path, text: Path, tmp_path: Path
) -> None:
    page = tmp_path / "report.html"
    ran = run_cli("compare", tiny, tiny_int8, "--text", text, "--windows", 2, "--tokens", 16, "--no-speed",
                  "--report", page, "--json", tmp_path / "compare.json")  # fmt: skip
    assert ran.code == 0, ran.err
    html = page.read_text()
    data = json.loads(html.partition('id="data">')[2].partition("</script>")[0])
    assert [row["label"] for row in data["rows"]] == ["fp32", "bf16", "tiny-int8"]
    assert (data["chosen"], data["windows"]) == (2, 2)
    measured = json.loads((tmp_path / "compare.json").read_text())
    assert data["tokens"] == measured["tokens"]
    kls = measured["rows"][2]["kls"][1]
    assert data["rows"][2]["kls"][1] == [None, *(float(f"{kl:.4g}") for kl in kls[:-1])]
    assert {module for module, *_ in data["rows"][2]["layers"]} >= {"model.layers.0.self_attn.q_proj", "lm_head"}
    assert all(place["token"] <= 16 for place in data["rows"][2]["worst"])


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("report.pdf", "ends in .html"),
        ("no/report.html", "the folder no does not exist; make it first"),
        ("folder.html", "is a folder; give a file name, such as folder.html/report.html"),
    ],
)
def test_a_wrong_name_is_refused_before_any_work(
    run_cli: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, why: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder.html").mkdir()
    ran = run_cli("compare", "not-there", "not-there-either", "--report", name)
    assert (ran.code, ran.out, ran.err.count("\n")) == (2, "", 1)
    assert ran.err.startswith("error: --report: ")
    assert why in ran.err
