// Each layer's error and format, as a map.

import { byId, h, onWidth, select } from "../page_base/dom.js";
import { chooser, chosen, onChoice } from "./choice.js";
import { data } from "./data.js";
import { fixed, significant } from "./figures.js";
import { heatMap, scale } from "./heat_map.js";

/** @typedef {import("./data.js").Layer} Layer */
/** @typedef {import("./heat_map.js").Cell} Cell */

const state = { by: "error", width: 0 };
const all = data.rows.flatMap((row) => row.layers);
const noises = all.flatMap(([, , , sqnr]) => (sqnr === null ? [] : [sqnr]));
const [least, most] = [Math.min(...noises), Math.max(...noises)]; // one scale for every model
const widest = Math.max(...all.map(([, , bits]) => bits ?? 0), 1);

/** Draw the map, if there are layers. */
export function start() {
  if (!all.length) return false;
  if (!noises.length) state.by = "bits";
  const controls = byId("layers-controls");
  controls.append(chooser((row) => row.layers.length > 0));
  if (noises.length) {
    /** @type {[string, string][]} */
    const options = [
      ["error", "error (SQNR)"],
      ["bits", "bits per weight"],
    ];
    controls.append(
      select("Colour by", options, state.by, (value) => {
        state.by = value;
        draw();
      }),
    );
  }
  onWidth(byId("layers-map"), (width) => {
    state.width = width;
    draw();
  });
  onChoice(draw);
  return true;
}

function draw() {
  const row = chosen();
  const place = byId("layers-map");
  byId("layers-said").textContent = "";
  if (!row.layers.length) {
    place.replaceChildren(h("p", { class: "note" }, `No layers of ${row.label} were measured; choose another model.`));
    return;
  }
  const cells = row.layers.map(state.by === "error" ? byError : byBits);
  const map = heatMap(cells, state.width, (text) => {
    byId("layers-said").textContent = text;
  });
  const hue = state.by === "error" ? "heat-error" : "heat-bits";
  place.className = hue;
  place.replaceChildren(h("div", { class: "figure padded" }, map), legend(hue));
  byId("layers-said").textContent = summary(row.layers);
}

/** @param {Layer} layer @returns {Cell} */
function byError([module, format, bits, sqnr]) {
  const strength = sqnr === null ? null : most === least ? 0.5 : (most - sqnr) / (most - least);
  return { module, strength, short: sqnr === null ? "" : fixed(sqnr, 0), says: says(module, format, bits, sqnr) };
}

/** @param {Layer} layer @returns {Cell} */
function byBits([module, format, bits, sqnr]) {
  const strength = bits === null ? null : Math.min(Math.log2(bits + 1) / Math.log2(widest + 1), 1);
  return { module, strength, short: significant(bits, 2), says: says(module, format, bits, sqnr) };
}

/** @param {string} module @param {string} format @param {number | null} bits @param {number | null} sqnr */
function says(module, format, bits, sqnr) {
  const size = bits === null ? "" : `, ${fixed(bits, 2)} bits per weight`;
  return `${module}: ${format}${size}, ${sqnr === null ? "error not measured" : `SQNR ${fixed(sqnr, 1)} dB`}`;
}

/** @param {string} hue */
function legend(hue) {
  if (state.by === "bits") return scale(hue, [[0, "few bits"], [1, `${significant(widest)} bits`]]); // biome-ignore format: short
  return scale(hue, [
    [0, `${fixed(most, 0)} dB, little error`],
    [1, `${fixed(least, 0)} dB, much error`],
  ]);
}

/** The layers that suffer most. @param {readonly Layer[]} layers */
function summary(layers) {
  const measured = layers.filter(([, , , sqnr]) => sqnr !== null);
  if (!measured.length) return "";
  const worst = measured.reduce((a, b) => ((a[3] ?? 0) <= (b[3] ?? 0) ? a : b));
  return `The worst: ${says(...worst)}.`;
}
