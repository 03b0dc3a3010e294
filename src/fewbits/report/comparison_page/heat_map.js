// Modules as a map: layers from left to right, what is in a layer from top to bottom.

import { h } from "../page_base/dom.js";
import { arrange } from "./modules.js";

/**
 * @typedef {object} Cell
 * @property {string} module
 * @property {number | null} strength 0 to 1; null has no colour
 * @property {string} short what is written in it, where there is room
 * @property {string} says
 */

const NAMES = 84; // px for the names of rows
const NARROWEST = 11;
const ROOM = 27; // px from which on a cell has text

/**
 * A map that is walked with the arrow keys. Of several modules in one place the strongest is shown.
 * @param {readonly Cell[]} cells @param {number} width of the page, px
 * @param {(text: string) => void} say is told of the cell that is pointed at
 */
export function heatMap(cells, width, say) {
  const { stacks, outside } = arrange(cells.map((cell) => cell.module));
  const map = h("div", { class: "heat" });
  for (const stack of stacks) {
    const size = Math.max(NARROWEST, (width - NAMES) / stack.layers.length - 2);
    const grid = h("div", {
      class: "heat-grid",
      role: "grid",
      "aria-label": `${stack.name}: layers from left to right`,
    });
    grid.style.gridTemplateColumns = `${NAMES - 8}px repeat(${stack.layers.length}, minmax(${NARROWEST}px, 1fr))`;
    const every = Math.ceil(24 / (size + 2));
    const heads = stack.layers.map((layer, at) => h("span", { role: "columnheader" }, at % every ? "" : String(layer)));
    grid.append(h("div", { role: "row", class: "heat-row" }, h("span", { role: "columnheader" }, "layer"), ...heads));
    for (const kind of stack.kinds) {
      const row = h("div", { role: "row", class: "heat-row" }, h("span", { role: "rowheader" }, kind.name));
      for (const layer of stack.layers) row.append(together(cells, kind.cells.get(layer) ?? [], size >= ROOM));
      grid.append(row);
    }
    map.append(stacks.length > 1 ? h("h3", { class: "sub" }, stack.name) : "", grid);
  }
  if (outside.length) {
    const row = h("div", { role: "row", class: "heat-outside" });
    for (const index of outside) {
      row.append(h("span", { class: "outside" }, `${cells[index].module} `, together(cells, [index], true)));
    }
    map.append(h("div", { role: "grid", "aria-label": "Outside the layers" }, row));
  }
  walk(map, say);
  return map;
}

/** @param {readonly Cell[]} cells @param {readonly number[]} indices @param {boolean} room */
function together(cells, indices, room) {
  if (!indices.length) return h("span", { role: "gridcell" });
  const sorted = indices.map((index) => cells[index]).sort((a, b) => (b.strength ?? -1) - (a.strength ?? -1));
  const [{ strength, short, says, module }] = sorted;
  const more = sorted.length > 1 ? ` (the strongest of ${sorted.length})` : "";
  const place = strength === null ? "cell blank" : strength > 0.6 ? "cell strong" : "cell";
  const cell = h(
    "button",
    { type: "button", role: "gridcell", class: place, tabindex: -1, "aria-label": says + more, "data-module": module },
    room ? short : null,
  );
  if (strength !== null) cell.style.setProperty("--strength", `${Math.round(6 + 94 * strength)}%`);
  return cell;
}

/** Arrow keys, the pointer and a tap. @param {HTMLElement} map @param {(text: string) => void} say */
function walk(map, say) {
  const first = /** @type {HTMLElement | null} */ (map.querySelector(".cell"));
  if (first) first.tabIndex = 0;
  const tell = (/** @type {Event} */ event) => {
    const cell = /** @type {Element} */ (event.target).closest(".cell");
    if (cell) say(cell.getAttribute("aria-label") ?? "");
  };
  map.addEventListener("pointerover", tell);
  map.addEventListener("click", tell);
  map.addEventListener("focusin", (event) => {
    tell(event);
    for (const cell of map.querySelectorAll(".cell[tabindex='0']")) cell.setAttribute("tabindex", "-1");
    /** @type {HTMLElement} */ (event.target).tabIndex = 0;
  });
  map.addEventListener("keydown", (event) => {
    const rows = [...map.querySelectorAll("[role='row']")].map((row) => [...row.querySelectorAll("[role='gridcell']")]);
    const y = rows.findIndex((row) => row.includes(/** @type {Element} */ (event.target)));
    if (y < 0) return;
    const x = rows[y].indexOf(/** @type {Element} */ (event.target));
    /** @type {Record<string, [number, number]>} */
    const ways = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
    const way = ways[event.key];
    if (!way) return;
    event.preventDefault();
    for (let at = [x + way[0], y + way[1]]; rows[at[1]]; at = [at[0] + way[0], at[1] + way[1]]) {
      const row = rows[at[1]];
      const next = row[way[1] ? Math.min(at[0], row.length - 1) : at[0]];
      if (!next && way[0]) return;
      if (!next?.classList.contains("cell")) continue;
      /** @type {HTMLElement} */ (next).focus();
      return;
    }
  });
}

/** What the colours mean: from faint to strong. @param {string} hue a class @param {readonly (readonly [number, string])[]} marks */
export function scale(hue, marks) {
  const pieces = Array.from({ length: 12 }, (_, index) => {
    const piece = h("i");
    piece.style.setProperty("--strength", `${Math.round(6 + (94 * index) / 11)}%`);
    return piece;
  });
  const texts = marks.map(([at, text]) => {
    const mark = h("span", { class: at < 0.1 ? "first" : at > 0.9 ? "last" : null }, text);
    mark.style.left = `${100 * at}%`;
    return mark;
  });
  return h(
    "div",
    { class: `scale ${hue}` },
    h("div", { class: "scale-bar" }, ...pieces),
    h("div", { class: "scale-marks" }, ...texts),
  );
}
