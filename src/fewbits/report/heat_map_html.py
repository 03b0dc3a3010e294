"""A preflight as one HTML page: verdict, worst layers, heat maps. It asks for nothing else, and is light or dark."""

from __future__ import annotations

from html import escape
from json import dumps
from pathlib import Path
from typing import Any

from fewbits.report.heat_map import intensity, module_names, panels
from fewbits.report.preflight import caption, keep_lines, percent, worst_rows

_ROWS = 20


def write_html(data: dict[str, Any], path: Path) -> None:
    """Write a preflight's JSON as a page."""
    path.write_text(page(data), encoding="utf-8")


def page(data: dict[str, Any]) -> str:
    """The page of a preflight's JSON."""
    maps = [
        {
            "title": f"{panel.title} in {panel.format}",
            "exponents": panel.exponents,
            "zones": panel.zones,
            "rows": [None if row is None else [round(intensity(share), 3) for share in row] for row in panel.shares],
            "shares": [None if row is None else [float(f"{share:.3g}") for share in row] for row in panel.shares],
        }
        for panel in panels(data)
    ]
    drawn = dumps({"names": module_names(data), "maps": maps}, separators=(",", ":")).replace("<", "\\u003c")
    title = f"Preflight: {data.get('model', 'model')} in {data['precision']}"
    kept = "".join(f"<li>{escape(line)}</li>" for line in keep_lines(data))
    parts = {
        "title": escape(title), "verdict": escape(data["verdict"]), "caption": escape(caption(data)), "data": drawn,
        "kept": f"<ul>{kept}</ul>" if kept else "", "table": _table(data), "style": _STYLE, "script": _SCRIPT,
    }  # fmt: skip
    return _PAGE.format(**parts)


def _table(data: dict[str, Any]) -> str:
    head = "".join(
        f"<th>{name}</th>" for name in ("module", "of", "format", "to zero", "subnormal", "saturated", "lost")
    )
    body = "".join(
        "<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in (
            row["name"], row["kind"].replace("_", " "), row["format"], percent(row["zeroed"]),
            percent(row["subnormal"]), percent(row["saturated"]), percent(row["lost"]),
        )) + "</tr>"
        for row in worst_rows(data, _ROWS)
    )  # fmt: skip
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'">
<meta name="color-scheme" content="light dark">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<h1>{title}</h1>
<p class="verdict">{verdict}</p>
{kept}
<p class="note">{caption}</p>
<h2>Exponents by layer</h2>
<p class="note">Each row is a layer, each column a binary exponent after scaling. The stronger a cell, the more of the
layer's values have it. Colour tells what the format makes of them:
<b class="zero">zero</b> <b class="subnormal">subnormal</b> <b class="normal">normal</b>
<b class="overflow">overflow</b>.</p>
<div class="maps"><canvas id="maps" role="img"
 aria-label="Heat maps of exponents; the table below has the worst layers"></canvas></div>
<p id="told" class="note" aria-live="polite">Point at a cell to read it.</p>
<h2>Worst layers first</h2>
<div class="maps">{table}</div>
<script type="application/json" id="data">{data}</script>
<script>{script}</script>
</body>
</html>
"""

_STYLE = """
:root { --back: #fff; --ink: #1b1f24; --dim: #59636e; --line: #c9d1d9;
  --zero: #c62828; --subnormal: #b9770e; --normal: #2166ac; --overflow: #8e1a8e; }
@media (prefers-color-scheme: dark) { :root { --back: #14171a; --ink: #e6e8ea; --dim: #9aa4ae; --line: #3a424a;
  --zero: #ff6b5e; --subnormal: #f0b13c; --normal: #6fb1f5; --overflow: #e07be0; } }
body { background: var(--back); color: var(--ink); font: 15px/1.5 system-ui, sans-serif; margin: 2rem; }
h1 { font-size: 1.4rem; } h2 { font-size: 1.1rem; margin-top: 2rem; }
.verdict { font-weight: 600; overflow-wrap: anywhere; } .note { color: var(--dim); max-width: 50rem; }
.maps { overflow-x: auto; } b.zero { color: var(--zero); } b.subnormal { color: var(--subnormal); }
b.normal { color: var(--normal); } b.overflow { color: var(--overflow); }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { text-align: right; padding: .2rem .8rem; border-bottom: 1px solid var(--line); }
th:nth-child(-n+3), td:nth-child(-n+3) { text-align: left; }
"""

_SCRIPT = """
const { names, maps } = JSON.parse(document.getElementById('data').textContent);
const canvas = document.getElementById('maps'), told = document.getElementById('told');
const cell = 8, row = names.length > 40 ? 8 : 14, gap = 24, top_ = 34, bottom = 22;
const pen = canvas.getContext('2d');
const small = '10px ui-monospace, monospace', large = '12px system-ui, sans-serif';
pen.font = small;
const label = Math.min(330, Math.max(...names.map(name => pen.measureText(name).width)) + 10);
const lefts = []; let width = label;
for (const map of maps) { lefts.push(width); width += map.exponents.length * cell + gap; }
const height = top_ + names.length * row + bottom;
function draw() {
  const css = getComputedStyle(document.documentElement), ratio = window.devicePixelRatio || 1;
  const colour = name => css.getPropertyValue('--' + name).trim();
  canvas.width = width * ratio; canvas.height = height * ratio;
  canvas.style.width = width + 'px'; canvas.style.height = height + 'px';
  pen.setTransform(ratio, 0, 0, ratio, 0, 0);
  pen.clearRect(0, 0, width, height);
  pen.font = small; pen.fillStyle = colour('dim'); pen.textBaseline = 'middle';
  const every = row < 10 ? 2 : 1;
  names.forEach((name, y) => { if (y % every === 0) pen.fillText(name, 0, top_ + (y + .5) * row, label - 6); });
  maps.forEach((map, index) => {
    const left = lefts[index], long = names.length * row;
    pen.font = large; pen.fillStyle = colour('ink'); pen.fillText(map.title, left, 10);
    map.exponents.forEach((e, x) => {
      pen.fillStyle = colour(map.zones[x]);
      pen.globalAlpha = .06; pen.fillRect(left + x * cell, top_, cell, long);
      map.rows.forEach((strengths, y) => {
        if (strengths && strengths[x] > 0) {
          pen.globalAlpha = strengths[x]; pen.fillRect(left + x * cell, top_ + y * row, cell, row - (row > 9 ? 1 : 0));
        }
      });
      pen.globalAlpha = 1;
      if (x && map.zones[x] !== map.zones[x - 1]) {
        pen.fillStyle = colour('dim'); pen.fillRect(left + x * cell - .5, top_ - 6, 1, long + 6);
      }
      if (e % 8 === 0) {
        pen.font = small; pen.fillStyle = colour('dim'); pen.fillText('2^' + e, left + x * cell, height - 10);
      }
    });
    let from = 0;
    map.zones.forEach((zone, x) => {
      if (x + 1 === map.zones.length || map.zones[x + 1] !== zone) {
        pen.font = small; pen.fillStyle = colour(zone);
        pen.fillText(zone, left + from * cell, 24, (x + 1 - from) * cell); from = x + 1;
      }
    });
  });
}
canvas.addEventListener('mousemove', event => {
  const box = canvas.getBoundingClientRect(), px = event.clientX - box.left, py = event.clientY - box.top;
  const y = Math.floor((py - top_) / row), index = lefts.findLastIndex(left => px >= left);
  if (index < 0 || y < 0 || y >= names.length) return;
  const map = maps[index], x = Math.floor((px - lefts[index]) / cell);
  if (x >= map.exponents.length) return;
  const shares = map.shares[y];
  const what = shares && (100 * shares[x]).toPrecision(3) + ' % of its values that are not 0 have exponent ';
  told.textContent = names[y] + ', ' + map.title + ': '
    + (shares ? what + map.exponents[x] + ' (' + map.zones[x] + ')' : 'nothing recorded');
});
window.matchMedia('(prefers-color-scheme: dark)').addEventListener('change', draw);
draw();
"""
