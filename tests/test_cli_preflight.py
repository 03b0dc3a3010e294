"""`fewbits preflight`: the table, the JSON, heat maps as HTML and PNG, and bad input."""

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

SMALL = ("--steps", 2, "--length", 16, "--batch", 2)


def test_it_prints_a_verdict_and_writes_json_and_a_page(run_cli: Callable, tiny: Path, tmp_path: Path) -> None:
    ran = run_cli("preflight", tiny, *SMALL, "--json", tmp_path / "p.json", "--report", tmp_path / "p.html")
    assert (ran.code, ran.err) == (0, "")
    assert "fp16 suits all 15 linear layers, with loss scale 2^" in " ".join(ran.out.split())
    data = json.loads((tmp_path / "p.json").read_text())
    assert (data["precision"], data["steps"], data["batch"], data["length"]) == ("fp16", 2, 2, 16)
    assert data["loss_scale"]["smallest"] <= data["loss_scale"]["recommended"] <= data["loss_scale"]["largest"]
    kinds = {row["kind"] for row in data["modules"] if row["name"] == "lm_head"}
    assert kinds == {"weight", "activation", "gradient", "weight_gradient"}
    page = (tmp_path / "p.html").read_text()
    assert data["verdict"] in page
    assert not re.search(r"(src|href)=|url\(|fetch\(|https?:", page), "the page asks for nothing else"
    assert "prefers-color-scheme: dark" in page
    drawn = json.loads(re.search(r'id="data">(.*?)</script>', page, re.DOTALL)[1])
    assert [drawn_map["title"] for drawn_map in drawn["maps"]] == [
        "weights in fp16", "activations in fp16", "gradients in fp16",
    ]  # fmt: skip
    for drawn_map in drawn["maps"]:
        assert {"subnormal", "zero", "normal", "overflow"} == set(drawn_map["zones"])
        for row in drawn_map["shares"]:
            assert row is None or sum(row) == pytest.approx(1, abs=0.01)


def test_it_draws_a_png(run_cli: Callable, tiny: Path, tmp_path: Path) -> None:
    ran = run_cli("preflight", tiny, *SMALL, "--precision", "fp8", "--report", tmp_path / "p.png")
    assert (ran.code, ran.err) == (0, "")
    assert (tmp_path / "p.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_a_png_without_matplotlib_names_the_remedy(
    run_cli: Callable, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    ran = run_cli("preflight", tiny, *SMALL, "--report", tmp_path / "p.png")
    assert ran.code == 2
    assert "needs matplotlib, which is not installed: pip install 'fewbits[plot]'" in ran.err


def test_bad_input_is_one_line(run_cli: Callable, tiny: Path, tmp_path: Path) -> None:
    short = tmp_path / "short.txt"
    short.write_text("one two three")
    for arguments, message in (
        (("--precision", "fp32"), "fp32 rounds nothing, so there is nothing to check"),
        (("--precision", "int8"), "recipe 'int8' is unknown"),
        (("--text", tmp_path / "none.txt"), "does not exist"),
        (("--text", short, "--length", 64), "short.txt is too short"),
        (("--report", tmp_path / "p.pdf"), "is neither .html nor .png"),
        (("--report", tmp_path / "no/p.html"), "does not exist; make it first"),
        (("--keep", "nothing"), "keep pattern 'nothing' matches none"),
    ):
        ran = run_cli("preflight", tiny, *SMALL, *arguments)
        assert ran.code == 2, arguments
        assert message in ran.err
        assert ran.err.count("\n") == 1
