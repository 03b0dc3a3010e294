"""Draw the pictures of the two pages that the README and the documentation show, with Chromium.

    fewbits compare SmolLM2-135M-Instruct.Q4_1.gguf smollm2-int8 --as int8-weight,fp8,int4,nf4 --json compare.json
    python tools/pictures.py compare.json          # docs/report.png and docs/explore.png

A picture is the page as a browser shows it, at 1.5 pixels to a point, in few colours so that the file is small.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
from pathlib import Path

from PIL import Image
from playwright.sync_api import Page, sync_playwright

from fewbits.report.comparison import write_report
from fewbits.report.explore import page_data
from fewbits.report.explore_page import page_html, write_page

DOCS = Path(__file__).parents[1] / "docs"
WIDTH, SCALE, COLOURS, LARGEST = 1120, 1.5, 192, 150_000


def main() -> None:
    """Write both pages to a temporary folder, and draw them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("comparison", type=Path, help="what fewbits compare --json wrote")
    parser.add_argument("--out", type=Path, default=DOCS, help="folder of the pictures")
    options = parser.parse_args()
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as runs:
        report, explore = Path(folder, "report.html"), Path(folder, "explore.html")
        write_report(json.loads(options.comparison.read_text()), report)
        write_page(explore, page_html(page_data()))
        browser = runs.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-gpu"])
        page = browser.new_page(
            viewport={"width": WIDTH, "height": 900}, device_scale_factor=SCALE, color_scheme="light"
        )
        page.goto(report.as_uri())
        draw(page, options.out / "report.png", "#layers")
        page.goto(explore.as_uri())
        draw(page, options.out / "explore.png", ".card:nth-of-type(4)")
        browser.close()


def draw(page: Page, out: Path, below: str) -> None:
    """Draw a page from its top to where an element begins."""
    box = page.locator(below).first.bounding_box()
    assert box is not None, f"the page has no {below}"
    page.set_viewport_size({"width": WIDTH, "height": int(box["y"]) - 24})
    page.screenshot(path=out)
    with Image.open(out) as picture:
        few = picture.convert("RGB").quantize(COLOURS, Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE)
    few.save(out, optimize=True)
    size = out.stat().st_size
    assert size < LARGEST, f"{out.name} takes {size} bytes, more than {LARGEST}"
    print(f"{out.name}: {few.width} × {few.height}, {size / 1e3:.0f} kB")


if __name__ == "__main__":
    main()
