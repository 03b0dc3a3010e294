"""The explore page as one file: its modules of JavaScript, style and data put together, with nothing to fetch.

    page/index.html    <link rel="stylesheet" href="style.css">          ->  <style>…</style>
                       <script type="module" src="main.js"></script>     ->  <script>…</script>, every module
                       <script id="data" …></script>                     ->  the data as JSON

Each module becomes a function called once, in the order of the imports, so that names stay apart:

    import { ZERO } from "./rational.js";       const { ZERO } = rational;
    export function decode(code, fmt) {…}       function decode(code, fmt) {…} … return { decode };
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import tempfile
from importlib.resources import files
from pathlib import Path
from typing import Any

from fewbits.errors import FewbitsError

_IMPORT = re.compile(r'^import (\{[^}]*\}) from "\./(\w+)\.js";\n', re.M)
_EXPORT = re.compile(r"^export (?=(?:async )?(?:function|class|const|let) (\w+))", re.M)
_DATA = '<script type="application/json" id="data">'
_LEFT_OVER = re.compile(r"^(?:import|export)\b.*", re.M)


def page_html(data: dict[str, Any]) -> str:
    """The page with its data, self-contained: HTML of well under 1 MB that makes no request."""
    script = bundle("main")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = f"default-src 'none'; script-src 'sha256-{digest}'; style-src 'unsafe-inline'; img-src data:"
    text = json.dumps(data, separators=(",", ":"), ensure_ascii=False).replace("<", "\\u003c")
    parts = {
        "<!-- policy -->": f'<meta http-equiv="Content-Security-Policy" content="{policy}">',
        '<link rel="stylesheet" href="style.css">': f"<style>{_asset('style.css')}</style>",
        f"{_DATA}</script>": f"{_DATA}{text}</script>",
        '<script type="module" src="main.js"></script>': f"<script>{script}</script>",
    }
    html = _asset("index.html")
    for mark, part in parts.items():
        before, found, after = html.partition(mark)
        assert found, f"page/index.html has no {mark}"
        html = before + part + after
    return html


def bundle(entry: str) -> str:
    """One script of a module and all that it imports; the last statement gives the exports of `entry`."""
    order: dict[str, str] = {}
    _visit(entry, order, ())
    script = '"use strict";\n' + "\n".join(order.values())
    assert "</script" not in script, "a page script would end itself"
    return script


def _visit(name: str, order: dict[str, str], above: tuple[str, ...]) -> None:
    """Add a module after those that it imports."""
    assert name not in above, f"page modules import each other in a circle: {' > '.join((*above, name))}"
    if name in order:
        return
    source = _asset(f"{name}.js")
    for _, imported in _IMPORT.findall(source):
        _visit(imported, order, (*above, name))
    source = _IMPORT.sub(lambda found: f"const {found[1].replace(' as ', ': ')} = {_variable(found[2])};\n", source)
    exported = _EXPORT.findall(source)
    source = _EXPORT.sub("", source)
    left = _LEFT_OVER.search(source)
    assert left is None, f"page/{name}.js: {left and left[0]!r} is not a form that the page is put together from"
    order[name] = f"const {_variable(name)} = (() => {{\n{source}return {{ {', '.join(exported)} }};\n}})();\n"


def _variable(module: str) -> str:
    return f"module_{module}"


def _asset(name: str) -> str:
    return files("fewbits.report").joinpath("page", name).read_text(encoding="utf-8")


def write_page(path: Path, html: str) -> None:
    """Write the page, whole or not at all: under a temporary name beside it, then renamed.

    Raises:
        FewbitsError: the path is a folder, or its folder does not exist.
        OSError: it cannot be written.
    """
    if path.is_dir():
        raise FewbitsError(f"--out: {path} is a folder; give a file name, such as {path / 'explore.html'}")
    if not path.absolute().parent.is_dir():
        raise FewbitsError(f"--out: the folder {path.parent} does not exist; make it first")
    descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.absolute().parent)
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(html)
            file.flush()
            os.fsync(file.fileno())
        Path(name).chmod(0o644)
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
