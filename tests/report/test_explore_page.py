"""The explore page in a real browser: clicks, typing, sliders, drags, keys, dark mode, a phone, and no request."""

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fewbits.report.explore import page_data
from fewbits.report.explore_page import page_html, write_page

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(
    CHROMIUM is None, reason="no Chromium: apt-get install chromium, or make browser as root"
)

FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
         "--disable-component-update", "--disable-sync"]  # fmt: skip


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as runs:
        browser = runs.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("explore") / "page.html"
    write_page(path, page_html(page_data()))
    return path


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

    def card(self, name: str) -> Any:
        return self.page.locator(f".card[data-format='{name}']")

    def bits(self, name: str) -> str:
        return "".join(self.card(name).locator(".bit").all_inner_texts())

    def kept(self, name: str) -> str:
        return str(self.card(name).locator(".kept dd").inner_text())


@pytest.fixture
def opened(browser: Any, path: Path) -> Iterator[Opened]:
    opened = Opened(browser, path)
    yield opened
    outside = [url for url in opened.asked if not url.startswith(("file:", "data:", "blob:"))]
    opened.page.close()
    assert opened.said == []
    assert outside == []


def test_the_file_is_small_and_loads_fast(opened: Opened, path: Path) -> None:
    assert path.stat().st_size < 1_000_000
    timing = opened.page.evaluate("performance.getEntriesByType('navigation')[0].duration")
    assert timing > 0
    assert opened.asked == [path.as_uri()]
    for section in ("number", "range", "block", "training", "memory"):
        assert opened.page.locator(f"#{section}-section").is_visible()


def test_a_number_is_typed(opened: Opened) -> None:
    field = opened.page.locator("#number")
    field.fill("0x1.8p-3")
    assert (opened.kept("fp16"), opened.bits("fp16")) == ("0.1875", "0011001000000000")
    field.fill("1000")
    assert opened.kept("bf16") == "1000"
    assert opened.kept("e4m3fn") == "448"
    assert "Saturated" in opened.card("e4m3fn").inner_text()
    field.fill("0x3F80")
    assert "a code of fp16" in opened.page.locator("#reading").inner_text()
    field.fill("ten")
    assert "“ten” is not a number" in opened.page.locator("#number-error").inner_text()
    assert opened.kept("fp16") == "1.875", "what is no number leaves the cards"


def test_a_bit_is_clicked(opened: Opened) -> None:
    opened.page.locator("#number").fill("1")
    bit = opened.card("fp16").locator(".bit[data-bit='0']")
    assert bit.get_attribute("aria-pressed") == "false"
    bit.click()
    assert opened.page.locator("#number").input_value() == "fp16:0x3C01"
    assert opened.kept("fp16") == "1.0009765625"
    assert opened.kept("bf16") == "1"
    assert bit.get_attribute("aria-pressed") == "true"
    for place in (14, 13):
        opened.card("fp16").locator(f".bit[data-bit='{place}']").click()
    assert opened.card("fp16").locator(".hex").inner_text() == "0x5C01"
    assert opened.card("fp16").locator(".bit").count() == 16


def test_a_nan_keeps_its_payload(opened: Opened) -> None:
    opened.page.locator("#number").fill("fp16:0x7C05")
    assert opened.bits("fp16") == "0111110000000101"
    assert (opened.kept("fp16"), opened.kept("bf16")) == ("NaN", "NaN")


def test_bits_by_keyboard(opened: Opened) -> None:
    opened.page.locator("#number").fill("1")
    opened.card("bf16").locator(".bit").first.focus()
    keys = opened.page.keyboard
    for key in ("End", "ArrowLeft", "Space"):
        keys.press(key)
    assert opened.card("bf16").locator(".hex").inner_text() == "0x3F82"
    keys.press("ArrowDown")
    assert opened.card("bf16").locator(".hex").inner_text() == "0x3F81"
    assert opened.page.evaluate("document.activeElement.dataset.bit") == "1", "the focus stays on the bit"
    assert opened.card("bf16").locator(".bit[tabindex='0']").count() == 1


def test_rounding_overflow_and_dialects(opened: Opened) -> None:
    page = opened.page
    page.locator("#number").fill("1000")
    overflow, rounding = page.get_by_label("Beyond the range").last, page.get_by_label("Rounding", exact=True).last
    overflow.select_option("ml_dtypes")
    assert opened.kept("e4m3fn") == "NaN"
    assert "ml_dtypes 0.6" in page.locator("#dialect").inner_text()
    overflow.select_option("torch")
    assert opened.kept("e4m3fn") == "448"
    page.locator("#number").fill("0.1")
    nearest = opened.kept("bf16")
    rounding.select_option("toward_zero")
    assert (nearest, opened.kept("bf16")) == ("0.10009765625", "0.099609375")
    rounding.select_option("stochastic")
    page.locator("#again").click()
    assert opened.kept("bf16") in ("0.10009765625", "0.099609375")


def test_any_format_is_added_and_removed(opened: Opened) -> None:
    page = opened.page
    page.locator("#format-name").fill("e5m3")
    page.keyboard.press("Enter")
    assert opened.bits("e5m3") == "001011101"
    page.locator("#format-name").fill("mxfp4")
    page.keyboard.press("Enter")
    assert "see Blocks" in page.locator("#format-error").inner_text()
    page.locator("#format-name").fill("bf61")
    page.keyboard.press("Enter")
    assert "no format “bf61”" in page.locator("#format-error").inner_text()
    opened.card("e5m3").get_by_label("Remove e5m3").click()
    assert opened.card("e5m3").count() == 0


def test_the_range_chart_has_every_format(opened: Opened) -> None:
    names = opened.page.locator("#range-chart .span .name").all_text_contents()
    assert names == [row["name"] for row in page_data()["formats"]]
    before = opened.page.locator("#range-chart .span[data-format='fp32'] rect").first.bounding_box()
    opened.page.locator("#range-far").click()
    after = opened.page.locator("#range-chart .span[data-format='fp32'] rect").first.bounding_box()
    assert after["width"] < before["width"] / 4
    assert opened.page.locator("#range-chart .span[data-format='fp32'] .subnormal").count() == 1


def test_the_number_line_zooms(opened: Opened) -> None:
    page, said = opened.page, opened.page.locator("#line-said")
    assert "e2m1fn 15" in said.inner_text()
    page.get_by_role("button", name="256 … 512").click()
    assert "fp16 1025, bf16 129, e4m3fn 7" in said.inner_text()
    page.locator("#line-chart").focus()
    page.keyboard.press("ArrowUp")
    assert "fp16 513, bf16 65" in said.inner_text()
    page.get_by_role("group", name="Formats on the number line").get_by_role("button", name="fp16").click()
    assert said.inner_text().startswith("bf16 65")


def noise(opened: Opened) -> dict[str, float]:
    """SQNR in dB of the 31 values that are not dragged, by scheme."""
    strips = opened.page.locator(".strip").all()
    found = {strip.get_attribute("aria-label"): re.search(r"([-\d.]+) dB", strip.inner_text()) for strip in strips}
    return {name: float(match[1]) for name, match in found.items() if match}


def test_an_outlier_is_dragged_and_the_others_suffer(opened: Opened) -> None:
    before = noise(opened)
    assert len(before) == 5
    chart = opened.page.locator("#block-chart")
    chart.scroll_into_view_if_needed()
    box = chart.bounding_box()
    x = box["x"] + box["width"] * 6.5 / 32
    opened.page.mouse.move(x, box["y"] + box["height"] / 2)
    opened.page.mouse.down()
    opened.page.mouse.move(x, box["y"] + 20, steps=4)
    opened.page.mouse.up()
    after = noise(opened)
    assert "value 7 of 32" in opened.page.locator("#block-said").inner_text()
    assert float(chart.get_attribute("aria-valuenow")) > 20
    worse = {name: before[name] - after[name] for name in before}
    assert all(loss > 12 for name, loss in worse.items() if name != "mxfp8"), worse
    assert worse["mxfp8"] < 6, "floats of 4 exponent bits hardly notice"
    assert opened.page.locator(".strip[data-scheme='int4'] .measure.bad").count() == 1
    opened.page.get_by_label("Scale of MX blocks").last.select_option("ceil")
    assert noise(opened)["mxfp4"] < after["mxfp4"]
    assert noise(opened)["nvfp4"] == after["nvfp4"]
    chart.focus()
    opened.page.keyboard.press("ArrowRight")
    opened.page.keyboard.press("ArrowUp")
    assert "value 8 of 32" in opened.page.locator("#block-said").inner_text()


def test_the_sum_of_ones_stops(opened: Opened) -> None:
    said = opened.page.locator("#sum-said")
    assert said.inner_text() == "4096 ones: e4m3fn stops at 16, bf16 stops at 256, fp16 stops at 2048."
    opened.page.get_by_label("Rounding of the sum").last.select_option("stochastic")
    assert "stops" not in said.inner_text()
    opened.page.locator("#sum-count").fill("7")
    assert "128 ones" in said.inner_text()
    assert "bf16 reaches 128" in said.inner_text()


def test_an_update_is_lost_without_master(opened: Opened) -> None:
    said = opened.page.locator("#update-said")
    assert "bf16 weight is still 1" in said.inner_text()
    assert "master is at 0.902344" in said.inner_text()
    opened.page.locator("#update-size").fill("-4")
    assert "still 1" not in said.inner_text()


def test_the_loss_scale_moves_the_gradients(opened: Opened) -> None:
    page, shares = opened.page, opened.page.locator("#gradient-said")
    assert "Loss scales from 2⁷ to 2¹⁷ work" in page.locator("#gradient-verdict").inner_text()
    zero = float(re.match(r"([\d.]+) %", shares.inner_text())[1])
    page.locator("#loss-scale").fill("14")
    assert float(re.match(r"([\d.]+) %", shares.inner_text())[1]) < zero / 2
    assert "0.0 % overflows" in shares.inner_text()
    page.locator("#loss-scale").fill("30")
    assert "0.0 % overflows" not in shares.inner_text()


def test_a_preflight_file_is_read(opened: Opened, tmp_path: Path) -> None:
    page = opened.page
    row = {"name": "head", "kind": "gradient", "exponents": {"-30": 3, "-10": 1}, "zeros": 2}
    file = tmp_path / "preflight.json"
    file.write_text(json.dumps({"format": "fp16", "modules": [row, row | {"kind": "weight"}]}))
    page.locator("#gradient-file").set_input_files(file)
    page.get_by_text("preflight.json: 1 histogram of gradients").wait_for(timeout=3000)
    assert "75.0 % becomes 0" in " ".join(page.locator("#gradient-said").inner_text().split())
    assert "2 gradients are 0 already" in page.locator("#gradient-verdict").inner_text()
    for text, why in (("no", "it is no JSON"), ("{}", "it has no modules"), ('{"modules": []}', "it has no gradients")):
        file.write_text(text)
        page.locator("#gradient-file").set_input_files(file)
        page.get_by_text(why).wait_for(timeout=3000)


def test_what_fits(opened: Opened) -> None:
    page = opened.page
    row = page.locator("#memory-running li[data-row='bf16']")
    assert "✓ fits" in row.inner_text()
    assert "weights 15.0 GiB + keys and values 1.0 GiB" in row.inner_text()
    page.locator("#memory").fill("4")
    assert "too large" in row.inner_text()
    assert "✓ fits" in page.locator("#memory-running li[data-row='int4']").inner_text()
    page.locator("#parameters").fill("1")
    assert "✓ fits" in row.inner_text()
    assert "16 bytes per parameter" in page.locator("#memory-training li").first.inner_text()


def test_dark_mode_follows_the_system_and_the_switch(browser: Any, path: Path) -> None:
    opened = Opened(browser, path, color_scheme="dark")
    paper = "getComputedStyle(document.body).backgroundColor"
    dark = opened.page.evaluate(paper)
    theme = opened.page.locator("#theme")
    theme.click()
    light = opened.page.evaluate(paper)
    theme.click()
    assert (dark, light) == ("rgb(18, 19, 23)", "rgb(251, 250, 247)")
    assert opened.page.evaluate(paper) == dark
    assert theme.inner_text() == "Theme: dark"
    opened.page.close()


def test_a_phone_sees_all_without_scrolling_sideways(browser: Any, path: Path) -> None:
    opened = Opened(browser, path, viewport={"width": 360, "height": 740}, has_touch=True, reduced_motion="reduce")
    assert opened.page.evaluate("document.documentElement.scrollWidth") == 360
    bit = opened.card("fp32").locator(".bit").last.bounding_box()
    assert bit["width"] >= 24 <= bit["height"], "large enough for a finger"
    assert bit["x"] + bit["width"] <= 360
    opened.card("fp32").locator(".bit").last.tap()
    assert opened.page.locator("#number").input_value() == "fp32:0x3DCCCCCC"
    assert opened.page.evaluate("getComputedStyle(document.documentElement).scrollBehavior") == "auto"
    opened.page.close()
    assert opened.said == []
