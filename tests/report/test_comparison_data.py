"""What the page of a comparison takes from its JSON, and the parts of its JavaScript that need no browser."""

import json
import math
import random
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from tiny_comparison import comparison

from fewbits.errors import FewbitsError
from fewbits.report.comparison import refuse_report, report_html, write_report
from fewbits.report.comparison_data import page_data, row_label

HARNESS = Path(__file__).parent / "page/comparison_harness.js"
NODE = shutil.which("node")
needs_node = pytest.mark.skipif(NODE is None, reason="node is not installed: the page's JavaScript is not run here")


def run_page(*jobs: tuple[str, Any]) -> list[Any]:
    """What the page's JavaScript makes of each job."""
    assert NODE is not None
    done = subprocess.run([NODE, HARNESS], input=json.dumps(jobs), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def embedded(html: str) -> dict[str, Any]:
    """The data in a page."""
    text = html.partition('<script type="application/json" id="data">')[2].partition("</script>")[0]
    return json.loads(text)


def test_what_was_measured_at_a_token_is_at_that_token() -> None:
    data = comparison(windows=1, length=4)
    data["rows"][2] |= {"losses": [[None, 1.0, 2.0, 3.0]], "kls": [[0.1, 0.2, 0.3, 0.4]]}
    data["rows"][2]["worst"] = [data["rows"][2]["worst"][0] | {"window": 0, "position": 2}]
    row = page_data(data)["rows"][2]
    assert row["losses"] == [[None, 1.0, 2.0, 3.0]]
    assert row["kls"] == [[None, 0.1, 0.2, 0.3]], "the prediction made at a token is of the next"
    assert row["worst"][0]["token"] == 3


@pytest.mark.parametrize(
    ("name", "precision", "label"),
    [("tiny.gguf", "bf16", "bf16"), ("out-int8", "int8", "out-int8"), ("out", "int8", "out (int8)")],
)
def test_labels(name: str, precision: str, label: str) -> None:
    assert row_label(name, precision, "tiny.gguf") == label


def test_rows_of_one_name_are_told_apart() -> None:
    data = comparison(candidates=2)
    data["rows"][3]["name"] = data["rows"][2]["name"] = "model"
    data["rows"][3]["precision"] = data["rows"][2]["precision"]
    assert [row["label"] for row in page_data(data)["rows"][2:]] == ["model (int8)", "model (int8) #2"]


def test_the_reference_and_the_first_candidate_are_found() -> None:
    made = page_data(comparison())
    assert (made["reference"], made["chosen"]) == (0, 2)
    live = comparison()
    for row in live["rows"]:
        row["name"] = live["reference"]
    assert page_data(live)["chosen"] == 2, "quantized while it was loaded: its name is the reference's"
    alone = comparison(candidates=0)
    assert page_data(alone)["chosen"] == 1
    without = comparison() | {"rows": comparison()["rows"][2:]}
    assert page_data(without)["reference"] is None


def test_what_json_cannot_say_becomes_none() -> None:
    data = comparison()
    data["rows"][2] |= {"kl": math.nan, "perplexity": math.inf, "losses": [[math.nan, -math.inf, 1.0]]}
    row = embedded(report_html(data))["rows"][2]
    assert (row["kl"], row["perplexity"], row["losses"]) == (None, None, [[None, None, 1.0]])


@pytest.mark.parametrize("data", [{}, {"rows": None, "tokens": None, "machine": None}, {"rows": [{"name": "a"}]}])
def test_any_part_may_be_missing(data: dict[str, Any]) -> None:
    assert len(embedded(report_html(data))["rows"]) == len(data.get("rows") or [])


def test_text_cannot_leave_the_data() -> None:
    evil = "</script><script>alert(1)</script><!-- \u2028 \ud83d \u202e"
    data = comparison(tokens=[[evil]], notes=[evil], reference=evil, text=evil)
    html = report_html(data)
    html.encode()  # half a character is written as an escape
    assert embedded(html)["tokens"] == [[evil]]
    assert html.count("</script>") == 2
    assert "<script>alert" not in html


def test_a_long_text_is_cut_and_the_page_stays_small() -> None:
    html = report_html(comparison(windows=8, length=512, candidates=6, layers=30))
    assert len(html.encode()) < 2_000_000
    assert len(embedded(html)["tokens"]) == 8
    made = page_data(comparison(windows=40, length=512, candidates=6, layers=1))
    assert (made["windows"], len(made["tokens"])) == (40, 34)
    assert all(len(row["losses"]) == len(row["kls"]) == 34 for row in made["rows"])


def test_a_search() -> None:
    search = {
        "target": "max_kl 0.02",
        "met": True,
        "assignment": [{"module": "lm_head", "precision": "nf4", "kl_alone": 1e-3}],
        "tried": [{"bits": 5.0, "kl": 0.03}, {"bits": 6.0, "kl": math.nan}],
    }
    made = page_data(comparison(search=search))["search"]
    assert (made["target"], made["max_kl"], made["met"]) == ("a KL of at most 0.02", 0.02, True)
    assert made["assignment"] == [{"module": "lm_head", "precision": "nf4", "bits": 4, "kl_alone": 1e-3}]
    assert made["tried"] == [{"bits": 5.0, "kl": 0.03}]
    made = page_data(comparison(search={"target": "max_kl 1e-05 and max_size 3,000 bytes"}))["search"]
    assert (made["target"], made["max_kl"]) == ("a KL of at most 1e-05 and a size of at most 3,000 bytes", 1e-5)
    assert page_data(comparison(search={"target": "max_size 3,000 bytes"}))["search"]["max_kl"] is None
    assert page_data(comparison())["search"] is None


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("report.json", ["--report", "report.json", "ends in .html"]),
        ("no/where.html", ["--report", "the folder", "does not exist"]),
        ("folder.html", ["--report", "is a folder"]),
    ],
)
def test_a_wrong_name_is_refused(tmp_path: Path, name: str, parts: list[str]) -> None:
    (tmp_path / "folder.html").mkdir()
    with pytest.raises(FewbitsError) as refused:
        write_report(comparison(), tmp_path / name)
    assert all(part in str(refused.value) for part in parts)
    assert [path.name for path in tmp_path.iterdir()] == ["folder.html"]


def test_a_folder_that_may_not_be_written_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.access", lambda *_: False)  # a real one lets root in
    with pytest.raises(FewbitsError, match=r"--report: the folder .* may not be written to"):
        refuse_report(tmp_path / "report.html")


def test_no_report_is_no_error() -> None:
    refuse_report(None)


@needs_node
def test_the_front_is_what_nothing_beats() -> None:
    draw = random.Random(1)
    places = [{"x": draw.randrange(12), "y": draw.randrange(12)} for _ in range(40)]
    (found,) = run_page(("front", places))

    def beaten(place: dict[str, int]) -> bool:
        return any(a["x"] <= place["x"] and a["y"] <= place["y"] and a != place for a in places)

    assert found == sorted(({**p} for p in {(p["x"], p["y"]): p for p in places}.values() if not beaten(p)),
                           key=lambda place: place["x"])  # fmt: skip


@needs_node
def test_names_do_not_overlap_while_there_is_room() -> None:
    inside = {"left": 0, "top": 0, "right": 600, "bottom": 400}
    points = [{"x": 300, "y": 200}, {"x": 304, "y": 203}, {"x": 296, "y": 198}, {"x": 590, "y": 200}]
    (boxes,) = run_page(("labels", {"points": points, "width": 70, "inside": inside}))
    for at, a in enumerate(boxes):
        assert a["left"] >= 0 <= a["top"]
        assert a["right"] <= 600
        for b in boxes[:at]:
            assert (
                a["right"] <= b["left"] or b["right"] <= a["left"] or a["bottom"] <= b["top"] or b["bottom"] <= a["top"]
            )


@needs_node
def test_modules_are_arranged_by_layer() -> None:
    llama = [f"model.layers.{i}.{kind}" for i in (0, 1, 10, 2) for kind in ("self_attn.q_proj", "mlp.down_proj")]
    moe = [f"model.layers.0.mlp.experts.{expert}.{name}" for expert in range(2) for name in ("up", "down")]
    t5 = ["encoder.block.0.layer.0.SelfAttention.q", "decoder.block.0.layer.0.SelfAttention.q"]
    twice = ["h.0.attn.c_proj", "h.0.mlp.c_proj"]
    one, two, three, four = run_page(
        ("arrange", ["lm_head", *llama]), ("arrange", moe), ("arrange", t5), ("arrange", twice)
    )
    assert one["outside"] == [0]
    assert one["stacks"] == [
        {
            "name": "model.layers",
            "layers": [0, 1, 2, 10],
            "kinds": [
                ["q_proj", [[0, [1]], [1, [3]], [10, [5]], [2, [7]]]],
                ["down_proj", [[0, [2]], [1, [4]], [10, [6]], [2, [8]]]],
            ],
        }
    ]
    assert two["stacks"][0]["kinds"] == [["up", [[0, [0, 2]]]], ["down", [[0, [1, 3]]]]]
    assert [stack["name"] for stack in three["stacks"]] == ["encoder.block", "decoder.block"]
    assert [name for name, _ in four["stacks"][0]["kinds"]] == ["attn.c_proj", "mlp.c_proj"]


@needs_node
def test_figures_have_as_many_digits_as_they_mean() -> None:
    made = run_page(
        ("withError", [0.00702, 0.0001, 4]), ("withError", [0.0012, 2.4e-5, 4]), ("withError", [96.2, 0.31, 1]),
        ("withError", [0, 0, 4]), ("withError", [None, None, 4]), ("withError", [0.5, None, 4]),
        ("perplexity", [16.24, 0.4123]), ("significant", [1820.4, 3]), ("significant", [-1.5e-8, 2]),
        ("bytes", 1023), ("bytes", 98_000_000), ("bytes", None),
    )  # fmt: skip
    assert made == ["0.00702 ± 0.00010", "0.00120 ± 0.00002", "96.2 ± 0.3", "0", "–", "0.5000", "16.240 ± 0.41",
                    "1,820", "−1.5e−8", "1023 B", "93.5 MiB", "–"]  # fmt: skip


@needs_node
def test_axes() -> None:
    assert run_page(("decades", [0.0012, 0.3]), ("decades", [1e-6, 2e-6]), ("doublings", [4, 32])) == [
        ["0.001", "0.01", "0.1", "1"], ["10⁻⁶", "10⁻⁵"], [4, 5, 6, 7, 8, 10, 12, 14, 16, 20, 24, 28, 32]]  # fmt: skip


@needs_node
def test_unseen_characters_are_shown() -> None:
    made = run_page(("visible", ""), ("visible", "a\nb"), ("visible", "\u202ea\u0000\u2028"), ("visible", "👩‍🔬"),
                    ("quoted", "\t\n"))  # fmt: skip
    assert made == ["▯", "a↵\nb", "⟨202E⟩a⟨0000⟩⟨2028⟩", "👩‍🔬", "“⇥↵”"]
