// Modules as a map: layers from left to right, what is in a layer from top to bottom; on a phone the other way round.

import { h } from "../page_base/dom.js";
import { arrange } from "./modules.js";

/**
 * @typedef {object} Cell
 * @property {string} module
 * @property {number | null} strength 0 to 1; null has no colour
 * @property {string} short what is written in it, where there is room
 * @property {string} says
 */

/** @typedef {import("./modules.js").Stack} Stack */
/** Names to the left and on top, and which modules are where. @typedef {{ corner: string, heads: string[], lines: { name: string, places: number[][] }[] }} Sheet */

const NAMES = 84; // px for the names of lines
const ROOM = 25; // px from which on a cell has text
const SMALL = 560; // px of width under which layers go from top to bottom

/**
 * A map that is walked with the arrow keys. Of several modules in one place the strongest is shown.
 * @param {readonly Cell[]} cells @param {number} width of the page, px
 * @param {(text: string) => void} say is told of the cell that is pointed at
 */
export function heatMap(cells, width, say) {
  const { stacks, outside } = arrange(cells.map((cell) => cell.module));
  const map = h("div", { class: "heat" });
  for (const stack of stacks) {
    if (stacks.length > 1) map.append(h("h3", { class: "sub" }, stack.name));
    map.append(
      drawn(cells, width < SMALL && stack.layers.length > 12 ? down(stack) : across(stack), stack.name, width),
    );
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

/** Layers from left to right. @param {Stack} stack @returns {Sheet} */
function across({ layers, kinds }) {
  const lines = kinds.map(({ name, cells }) => ({ name, places: layers.map((layer) => cells.get(layer) ?? []) }));
  return { corner: "layer", heads: layers.map(String), lines };
}

/** Layers from top to bottom, where a page is narrow. @param {Stack} stack @returns {Sheet} */
function down({ layers, kinds }) {
  const lines = layers.map((layer) => ({
    name: String(layer),
    places: kinds.map(({ cells }) => cells.get(layer) ?? []),
  }));
  return { corner: "layer", heads: kinds.map(({ name }) => name), lines };
}

/** @param {readonly Cell[]} cells @param {Sheet} sheet @param {string} name @param {number} width */
function drawn(cells, { corner, heads, lines }, name, width) {
  const upright = heads.some((head) => head.length > 3); // names of kinds do not fit above a column otherwise
  const names = upright ? NAMES / 2 : NAMES;
  const size = (width - names - 36) / heads.length - 2;
  const every = upright ? 1 : Math.ceil(24 / Math.max(size + 2, 1));
  const grid = h("div", {
    class: upright ? "heat-grid down" : "heat-grid",
    role: "grid",
    "aria-label": `${name}, by layer`,
  });
  grid.style.gridTemplateColumns = `${names - 8}px repeat(${heads.length}, minmax(7px, 1fr))`;
  const texts = heads.map((head, at) => h("span", { role: "columnheader" }, at % every ? "" : head));
  grid.append(h("div", { role: "row", class: "heat-row" }, h("span", { role: "columnheader" }, corner), ...texts));
  for (const line of lines) {
    const row = h("div", { role: "row", class: "heat-row" }, h("span", { role: "rowheader" }, line.name));
    for (const place of line.places) row.append(together(cells, place, size >= ROOM));
    grid.append(row);
  }
  return grid;
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

/** What the colours mean, from faint to strong. @param {string} hue a class @param {readonly (readonly [number, string])[]} marks
 * @param {number} darkest per cent */
export function scale(hue, marks, darkest = 100) {
  const pieces = Array.from({ length: 12 }, (_, index) => {
    const piece = h("i");
    piece.style.setProperty("--strength", `${Math.round((darkest * (0.7 + index)) / 11.7)}%`);
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
