// Bars of bytes, one model after the other, all on one scale.

import { byId, h } from "../page_base/dom.js";
import { data } from "./data.js";
import { bytes } from "./figures.js";

/** @typedef {import("./data.js").Row} Row */

/** @type {[string, string, (row: Row) => number | null][]} */
const KINDS = [
  ["on disk", "disk", (row) => row.disk_bytes],
  ["in memory", "weights", (row) => row.memory_bytes],
  ["peak", "peak", (row) => row.peak_bytes],
];

/** Draw them, if there are any. */
export function start() {
  const sizes = data.rows.flatMap((row) => KINDS.map(([, , of]) => of(row) ?? 0));
  const most = Math.max(0, ...sizes);
  if (!most) return false;
  byId("memory-bars").append(...data.rows.map((row) => bars(row, most)));
  return true;
}

/** @param {Row} row @param {number} most */
function bars(row, most) {
  const lines = KINDS.flatMap(([name, kind, of]) => {
    const size = of(row);
    if (size === null) return [];
    const bar = h("span", { class: `piece ${kind}` });
    bar.style.width = `${(100 * size) / most}%`;
    return [
      h("dt", {}, name),
      h("dd", { class: "bar-rail", "aria-hidden": "true" }, bar),
      h("dd", { class: "size" }, bytes(size)),
    ];
  });
  return h("li", { "data-row": row.label }, h("strong", {}, row.label), h("dl", { class: "bars" }, ...lines));
}
