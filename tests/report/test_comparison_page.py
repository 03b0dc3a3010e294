"""The report of a comparison in a real browser: sorting, tokens, keys, dark mode, a phone, odd text, no request."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tiny_comparison import comparison

from fewbits.report.comparison import write_report

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(
    CHROMIUM is None, reason="no Chromium: apt-get install chromium, or make browser as root"
)

FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
         "--disable-component-update", "--disable-sync"]  # fmt: skip
SEARCH = {
    "target": "max_kl 0.02",
    "met": False,
    "assignment": [
        {"module": f"model.layers.{layer}.mlp.{name}", "precision": "int4" if layer else "int8", "kl_alone": 0.001}
        for layer in range(4) for name in ("up_proj", "down_proj")
    ],
    "tried": [{"bits": 4.5, "kl": 0.1}, {"bits": 6.0, "kl": 0.03}],
    "left_out": {"nf4": "the layout has no place for it"},
}  # fmt: skip


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as runs:
        browser = runs.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


class Opened:
    """A page of its own, with all that it said and asked for."""

    def __init__(self, browser: Any, path: Path, **options: Any) -> None:
        self.said: list[str] = []
        self.asked: list[str] = []
        self.page = browser.new_page(**({"viewport": {"width": 1280, "height": 900}} | options))
        self.page.on("console", lambda message: self.said.append(message.text))
        self.page.on("pageerror", lambda error: self.said.append(str(error)))
        self.page.on("request", lambda request: self.asked.append(request.url))
        self.page.goto(path.as_uri())
        self.path = path

    def text(self, selector: str) -> str:
        return " ".join(self.page.locator(selector).inner_text().split())

    def column(self, place: int) -> list[str]:
        return [row.split("\t")[place].strip() for row in self.page.locator(".summary tbody tr").all_inner_texts()]

    def close(self) -> None:
        """Nothing was said on the console, and nothing but the file asked for."""
        self.page.close()
        assert self.said == []
        assert self.asked == [self.path.as_uri()]


@pytest.fixture
def opening(browser: Any, tmp_path: Path) -> Iterator[Any]:
    opened: list[Opened] = []

    def open_page(data: dict[str, Any], **options: Any) -> Opened:
        path = tmp_path / f"report{len(opened)}.html"
        write_report(data, path)
        opened.append(Opened(browser, path, **options))
        return opened[-1]

    yield open_page
    for each in opened:
        each.close()


def test_every_part_is_there(opening: Any) -> None:
    opened = opening(comparison(search=SEARCH, notes=["Perplexity 410: the reference makes no sense of this text."]))
    for section in ("summary", "plot", "search", "layers", "memory", "text", "worst"):
        assert opened.page.locator(f"#{section}").is_visible()
        assert opened.page.locator(f"nav a[href='#{section}']").count() == 1
    assert "makes no sense of this text" in opened.text("#notes")
    assert opened.text("#about").startswith(
        "bf16, tiny-int8, tiny-fp8 and tiny-int4 held against tiny.gguf (93.5 MiB on disk) in fp32 on Python 3.11.7"
    )
    assert "AMD EPYC, 2 threads, avx512, 16.0 GiB RAM" in opened.text("#made")
    assert "torch 2.13.0+cpu" in opened.text("#made")
    row = opened.text(".summary tr[data-row='tiny-int8']")
    assert row == "tiny-int8 int8 8.02 122 MiB 130 MiB 0.00700 ± 0.00018 99.7 ± 0.2 16.314 ± 0.41 2,490 112"


def test_a_heading_sorts(opening: Any) -> None:
    data = comparison()
    data["rows"][3]["kl"] = None
    opened = opening(data)
    measured = opened.column(0)
    head = opened.page.locator("th[data-column='KL'] button")
    head.click()
    assert opened.column(0) == ["fp32", "bf16", "tiny-int8", "tiny-int4", "tiny-fp8"], "without a figure comes last"
    assert opened.page.locator("th[data-column='KL']").get_attribute("aria-sort") == "ascending"
    head.focus()
    opened.page.keyboard.press("Enter")
    assert opened.column(0) == ["tiny-int4", "tiny-int8", "bf16", "fp32", "tiny-fp8"]
    head.click()
    assert opened.column(0) == measured
    opened.page.locator("th[data-column='Model'] button").click()
    assert opened.column(0) == sorted(measured)


def test_a_model_is_chosen_for_the_whole_page(opening: Any) -> None:
    opened = opening(comparison())
    page = opened.page
    page.get_by_role("button", name="tiny-int4", exact=True).click()
    for section in ("layers", "text", "worst"):
        chosen = page.locator(f"#{section}-controls select").first
        assert chosen.evaluate("list => list.selectedOptions[0].text") == "tiny-int4"
    assert opened.text("#plot-said").startswith("tiny-int4: KL 0.190 ± 0.005 nats/token, 4.25 bits per weight")
    assert "int4" in page.locator("#layers-map .cell").first.get_attribute("aria-label")
    page.locator("#layers-controls select").first.select_option(label="fp32")
    assert "error not measured" in page.locator("#layers-map .cell").first.get_attribute("aria-label")
    assert "None were recorded of fp32" in opened.text("#worst-list")


def test_the_plot(opening: Any) -> None:
    opened = opening(comparison(search=SEARCH))
    page, said = opened.page, opened.page.locator("#plot-said")
    assert page.locator("#plot-chart .point .name").all_text_contents() == [
        "fp32", "bf16", "tiny-int8", "tiny-fp8", "tiny-int4"]  # fmt: skip
    assert page.locator("#plot-chart .tried").count() == 2
    assert "asked for: at most 0.02" in page.locator("#plot-chart .target").text_content()

    def place(point: int) -> tuple[float, float]:
        dot = page.locator(f"[data-point='{point}'] .dot")
        return float(dot.get_attribute("cx")), float(dot.get_attribute("cy"))

    (left, high), (middle, low), (right, none) = place(4), place(2), place(0)
    assert left < middle < right
    assert high < low < none, "the more loss, the higher; 0 lies below the scale"
    page.locator("[data-point='3']").hover()
    assert said.inner_text().startswith("tiny-fp8: KL 0.0200")
    page.locator("[data-point='4']").focus()
    assert said.inner_text().startswith("tiny-int4")
    page.keyboard.press("Enter")
    assert page.locator(".summary tr.chosen").get_attribute("data-row") == "tiny-int4"
    assert page.evaluate("document.activeElement.dataset.point") == "4", "the focus stays"
    page.locator("#plot-controls select").select_option("disk")
    assert "MiB" in opened.text("#plot-chart")
    assert page.locator("#plot-chart .tried").count() == 0


def test_layers_by_pointer_and_by_keys(opening: Any) -> None:
    opened = opening(comparison())
    page = opened.page
    assert page.locator("#layers-map .heat-grid .cell").count() == 4 * 7
    assert opened.text("#layers-said").startswith("The worst: ")
    page.locator("#layers-map [data-module='model.layers.2.mlp.up_proj']").hover()
    assert opened.text("#layers-said").startswith("model.layers.2.mlp.up_proj: int8, 8.02 bits per weight, SQNR ")
    page.locator("#layers-map .cell").first.focus()
    for key in ("ArrowRight", "ArrowDown", "ArrowDown"):
        page.keyboard.press(key)
    assert opened.text("#layers-said").startswith("model.layers.1.self_attn.v_proj")
    for _ in range(5):
        page.keyboard.press("ArrowDown")
    assert opened.text("#layers-said").startswith("lm_head")
    page.locator("#layers-controls select").last.select_option("bits")
    assert page.locator("#layers-map .cell").first.inner_text() == "8"


def test_a_search(opening: Any) -> None:
    opened = opening(comparison(search=SEARCH))
    about = opened.text("#search-about")
    assert "Asked for: a KL of at most 0.02. It could not be met" in about
    assert "int4: 6 modules int8: 2 modules" in opened.text("#search-map")
    opened.page.locator("#search-map [data-module='model.layers.0.mlp.up_proj']").hover()
    assert opened.text("#search-said") == "model.layers.0.mlp.up_proj: int8, KL 0.001 if only its group were so"
    assert opened.text("#search-left-out") == "Without nf4: the layout has no place for it"
    opened.page.locator("#search-controls select").select_option("kl")
    assert "KL 0.001" in opened.text("#search-map")


def test_a_token_is_clicked(opening: Any) -> None:
    data = comparison()
    data["tokens"][0][7] = " precision"
    row = data["rows"][2]
    row["losses"][0][7], data["rows"][0]["losses"][0][7], row["kls"][0][6] = 2.5, 2.0, 0.125
    opened = opening(data)
    page, told = opened.page, "#token-told"
    assert opened.text(told) == "Choose a token."
    token = page.locator("#tokens [data-token='7']")
    token.click()
    assert "“ precision” Window 1, token 8" in opened.text(told)
    assert "tiny-int8 2.500 +0.500 0.13" in opened.text(told)
    assert "fp32 2.000 – 0" in opened.text(told)
    assert token.get_attribute("aria-pressed") == "true"
    assert token.get_attribute("class") == "worse"
    page.keyboard.press("ArrowRight")
    assert "token 9" in opened.text(told)
    page.keyboard.press("ArrowDown")
    below = page.locator("#tokens [aria-pressed]").bounding_box()
    assert below["y"] > page.locator("#tokens [data-token='8']").bounding_box()["y"]
    page.keyboard.press("ArrowUp")
    page.keyboard.press("Home")
    assert "the first has nothing to be foreseen from" in opened.text(told)
    assert page.locator("#tokens [data-token='0']").get_attribute("class") == "", "the first has no colour"
    page.keyboard.press("ArrowLeft")
    assert "token 1:" in opened.text(told)


def test_colours_by_loss_and_by_difference(opening: Any) -> None:
    data = comparison(windows=1)
    for row in data["rows"]:
        row["losses"] = [[None] + [1.0] * 47]
    data["rows"][2]["losses"] = [[None, 3.0, 0.5, *[1.0] * 45]]
    opened = opening(data)
    page = opened.page
    page.locator("#text-controls select").nth(1).select_option("difference")
    classes = [page.locator(f"#tokens [data-token='{at}']").get_attribute("class") for at in (1, 2, 3)]
    assert classes == ["worse", "better", ""]
    page.locator("#highest").click()
    assert page.evaluate("document.activeElement.dataset.token") == "1"
    page.locator("#text-controls select").nth(1).select_option("loss")
    assert page.locator("#tokens [data-token='3']").get_attribute("class") == "worse"


def test_windows_and_the_worst_places(opening: Any) -> None:
    opened = opening(comparison(windows=3))
    page = opened.page
    page.get_by_label("Window", exact=True).last.select_option("2")
    assert page.locator("#tokens [data-token]").count() == 48
    page.locator("#tokens [data-token='5']").click()
    assert "Window 3, token 6" in opened.text("#token-told")
    assert page.locator(".place").count() == 4
    page.locator("#worst-more").click()
    assert page.locator(".place").count() == 6
    place = comparison(windows=3)["rows"][2]["worst"][0]
    first = page.locator(".place").first
    assert f"window {place['window'] + 1}, token {place['position'] + 2}" in first.inner_text()
    assert "“ class”" in first.inner_text()
    assert "44 %" in first.inner_text()
    first.get_by_role("button").click()
    assert f"Window {place['window'] + 1}, token {place['position'] + 2}" in opened.text("#token-told")
    assert "The reference" in opened.text("#token-told"), "at a worst place it says what the models would have said"


EVIL = [
    "<script>alert(1)</script>", "</script><img src=x onerror=alert(2)>", "\"'&amp;", "\u2028", "\u2029", "👩‍🔬",
    "שלום", "مرحبا", "\u202egnirts", "\x00", "\ud83d", "", "a\r\n\tb", "]]>", "<!--",
]  # fmt: skip


def test_text_is_text(opening: Any) -> None:
    data = comparison(windows=1, length=len(EVIL), tokens=[EVIL], notes=EVIL, text=EVIL[0])
    data["rows"][2] |= {"name": EVIL[1], "precision": EVIL[0]}
    data["rows"][2]["layers"][0] |= {"module": EVIL[0], "format": EVIL[1]}
    for place in data["rows"][2]["worst"]:
        place |= {"context": "".join(EVIL), "following": EVIL[1], "reference": [[EVIL[0], 0.5]]}
    opened = opening(data)
    tokens = opened.page.locator("#tokens [data-token]").all_text_contents()
    assert tokens[:3] == EVIL[:3]
    assert tokens[3:] == ["⟨2028⟩", "⟨2029⟩", "👩‍🔬", "שלום", "مرحبا", "⟨202E⟩gnirts", "⟨0000⟩", "\ud83d", "▯",
                          "a⟨000D⟩↵\n\tb", "]]>", "<!--"]  # fmt: skip
    assert opened.page.locator("script, img").count() == 2, "the data and the page's own script"
    opened.page.locator("#tokens [data-token='1']").click()
    assert f"“{EVIL[1]}”" in opened.text("#token-told")
    assert opened.page.locator(".place mark").first.inner_text() == EVIL[1]


def test_parts_without_data_are_left_out(opening: Any) -> None:
    nothing = {"layers": [], "losses": [], "kls": None, "worst": [], "disk_bytes": None, "memory_bytes": None,
               "peak_bytes": None, "prefill_tps": None, "decode_tps": None, "top1_stderr": None}  # fmt: skip
    data = comparison(tokens=[], machine=None, reference_bytes=None)
    data["rows"] = [row | nothing for row in data["rows"]]
    data["rows"][3] |= {"kl": None, "perplexity": None, "bits_per_weight": None}
    opened = opening(data)
    assert opened.page.locator("main section").count() == 2
    assert opened.page.locator("nav a").all_text_contents() == ["Summary", "Bits and loss"]
    heads = opened.page.locator(".summary th[data-column]").evaluate_all("all => all.map(th => th.dataset.column)")
    assert heads == ["Model", "Precision", "Bits", "KL", "Top-1", "Perplexity"]
    assert opened.text(".summary tr[data-row='tiny-fp8']") == "tiny-fp8 fp8 – – 99.0 –"
    assert "for want of a finite KL or a size: tiny-fp8" in opened.text("#plot-missing")


def test_losses_without_tokens_or_a_candidate(opening: Any) -> None:
    opened = opening(comparison(tokens=[], candidates=0))
    assert opened.page.locator("#text").count() == 0
    assert opened.page.locator(".place button").count() == 0, "no text to be seen in"
    empty = opening({"rows": [], "reference": "nothing.gguf"})
    assert empty.page.locator("main section").count() == 1
    searched = opening({"rows": [], "search": SEARCH})
    assert searched.page.locator("main section").count() == 3, "a search alone has a plot of what was tried"


def test_a_long_text_keeps_the_page_small(opening: Any) -> None:
    opened = opening(comparison(windows=8, length=512, candidates=6, layers=32))
    assert opened.path.stat().st_size < 2_000_000
    assert opened.page.locator("#tokens [data-token]").count() == 512, "one window at a time"
    assert opened.page.locator("*").count() < 4000


def test_dark_and_light(opening: Any) -> None:
    opened = opening(comparison(), color_scheme="dark")
    page = opened.page

    def colours() -> list[Any]:
        return [
            page.evaluate("getComputedStyle(document.body).backgroundColor"),
            page.evaluate("getComputedStyle(document.querySelector('.dot')).fill"),
            page.locator("#layers-map .cell").first.evaluate("cell => getComputedStyle(cell).backgroundColor"),
        ]

    dark = colours()
    page.locator("#theme").click()
    light = colours()
    assert (dark[0], light[0]) == ("rgb(18, 19, 23)", "rgb(251, 250, 247)")
    assert all(a != b for a, b in zip(dark, light, strict=True))


def test_a_phone(opening: Any) -> None:
    options = {"viewport": {"width": 360, "height": 740}, "has_touch": True, "reduced_motion": "reduce"}
    opened = opening(comparison(windows=1, layers=24, search=SEARCH), **options)
    page = opened.page
    assert page.evaluate("document.documentElement.scrollWidth") == 360
    heads = page.locator("#layers-map .heat-row").first.inner_text().split()
    assert heads[:3] == ["layer", "q_proj", "k_proj"], "layers go from top to bottom"
    cell = page.locator("#layers-map .cell").last.bounding_box()
    assert cell["x"] + cell["width"] <= 360
    page.locator("#layers-map [data-module='model.layers.7.mlp.up_proj']").tap()
    assert opened.text("#layers-said").startswith("model.layers.7.mlp.up_proj")
    token = page.locator("#tokens [data-token='3']")
    token.tap()
    told = page.locator("#token-told").bounding_box()
    assert told["y"] < 740, "what is told of it can be seen"
    assert told["height"] <= 740 * 0.41


def test_the_page_of_a_json_file_is_the_same(opening: Any, tmp_path: Path) -> None:
    (tmp_path / "compare.json").write_text(json.dumps(comparison()))
    again = json.loads((tmp_path / "compare.json").read_text())
    write_report(comparison(), tmp_path / "a.html")
    write_report(again, tmp_path / "b.html")
    assert (tmp_path / "a.html").read_text() == (tmp_path / "b.html").read_text()
