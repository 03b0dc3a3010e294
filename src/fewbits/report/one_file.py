"""A page as one file: its modules of JavaScript, style and data put together, with nothing to fetch.

    page/index.html    <link rel="stylesheet" href="style.css">          ->  <style>…</style>
                       <script type="module" src="main.js"></script>     ->  <script>…</script>, every module
                       <script type="application/json" id="data"> …      ->  the data as JSON
                       <!-- policy -->                                   ->  nothing may be fetched, no other script run

Each module becomes a function called once, in the order of the imports, so that names stay apart:

    import { ZERO } from "./rational.js";       const { ZERO } = module_rational;
    export function decode(code, fmt) {…}       function decode(code, fmt) {…} … return { decode };

Modules and styles that the pages share are in page_base/, and named ../page_base/dom.js.
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

_IMPORT = re.compile(
    r'^import (\{[^}]*\}) from "\./(\w+)\.js";\n|^import (\{[^}]*\}) from "\.\./(\w+/\w+)\.js";\n', re.M
)
_EXPORT = re.compile(r"^export (?=(?:async )?(?:function|class|const|let) (\w+))", re.M)
_LEFT_OVER = re.compile(r"^(?:import|export)\b.*", re.M)
_STYLE = re.compile(r'<link rel="stylesheet" href="(?:\.\./(\w+)/)?(\w+\.css)">')
_DATA = '<script type="application/json" id="data">'
_SURROGATE = re.compile("[\ud800-\udfff]")


def one_file(folder: str, data: dict[str, Any]) -> str:
    """A page with its data, self-contained: HTML that makes no request.

    Args:
        folder: where its index.html is, beside this module.
        data: plain data, without NaN and Inf, which JSON cannot say.
    """
    script = bundle(folder, "main")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = f"default-src 'none'; script-src 'sha256-{digest}'; style-src 'unsafe-inline'; img-src data:"
    html = _STYLE.sub(
        lambda found: f"<style>{_asset(found[1] or folder, found[2])}</style>", _asset(folder, "index.html")
    )
    parts = {
        "<!-- policy -->": f'<meta http-equiv="Content-Security-Policy" content="{policy}">',
        f"{_DATA}</script>": f"{_DATA}{_json(data)}</script>",
        '<script type="module" src="main.js"></script>': f"<script>{script}</script>",
    }
    for mark, part in parts.items():
        before, found, after = html.partition(mark)
        assert found, f"{folder}/index.html has no {mark}"
        html = before + part + after
    return html


def _json(data: dict[str, Any]) -> str:
    """JSON that neither ends the element that it is in, nor holds half a character that UTF-8 cannot write."""
    text = json.dumps(data, separators=(",", ":"), ensure_ascii=False, allow_nan=False).replace("<", "\\u003c")
    return _SURROGATE.sub(lambda found: f"\\u{ord(found[0]):04x}", text)


def bundle(folder: str, entry: str) -> str:
    """One script of a module and all that it imports; the last statement gives the exports of `entry`."""
    order: dict[str, str] = {}
    _visit(f"{folder}/{entry}", order, ())
    script = '"use strict";\n' + "\n".join(order.values())
    assert "</script" not in script, "a page script would end itself"
    return script


def _visit(module: str, order: dict[str, str], above: tuple[str, ...]) -> None:
    """Add a module, named folder/name, after those that it imports."""
    assert module not in above, f"page modules import each other in a circle: {' > '.join((*above, module))}"
    if module in order:
        return
    folder, _, name = module.partition("/")
    source = _asset(folder, f"{name}.js")

    def imported(found: re.Match[str]) -> str:
        other = found[4] or f"{folder}/{found[2]}"
        _visit(other, order, (*above, module))
        return f"const {(found[1] or found[3]).replace(' as ', ': ')} = {_variable(other)};\n"

    source = _IMPORT.sub(imported, source)
    exported = _EXPORT.findall(source)
    source = _EXPORT.sub("", source)
    left = _LEFT_OVER.search(source)
    assert left is None, f"{module}.js: {left and left[0]!r} is not a form that a page is put together from"
    order[module] = f"const {_variable(module)} = (() => {{\n{source}return {{ {', '.join(exported)} }};\n}})();\n"


def _variable(module: str) -> str:
    return f"module_{module.replace('/', '_')}"


def _asset(folder: str, name: str) -> str:
    return files("fewbits.report").joinpath(folder, name).read_text(encoding="utf-8")


def refuse_unwritable(path: Path, option: str, example: str) -> None:
    """Find a wrong file name before the work, not after.

    Args:
        path: the file to be written.
        option: what named it, such as `--out`.
        example: a file name to offer in place of a folder.

    Raises:
        FewbitsError: the path is a folder, or its folder does not exist or may not be written to.
    """
    if path.is_dir():
        raise FewbitsError(f"{option}: {path} is a folder; give a file name, such as {path / example}")
    folder = path.absolute().parent
    if not folder.is_dir():
        raise FewbitsError(f"{option}: the folder {path.parent} does not exist; make it first")
    if not os.access(folder, os.W_OK):
        raise FewbitsError(f"{option}: the folder {path.parent} may not be written to; name another")


def write_whole(path: Path, text: str) -> None:
    """Write a text, whole or not at all: under a temporary name beside it, then renamed.

    Raises:
        OSError: it cannot be written.
    """
    descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.absolute().parent)
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        Path(name).chmod(0o644)
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
