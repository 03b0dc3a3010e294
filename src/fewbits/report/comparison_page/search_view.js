// What a search for a contract on loss chose for each module.

import { byId, h, onWidth, select } from "../page_base/dom.js";
import { data } from "./data.js";
import { significant } from "./figures.js";
import { heatMap, scale } from "./heat_map.js";

/** @typedef {import("./data.js").Assigned} Assigned */

const state = { by: "bits", width: 0 };
const assignment = data.search?.assignment ?? [];
const alone = assignment.flatMap(({ kl_alone: kl }) => (kl !== null && kl > 0 ? [kl] : []));
const [least, most] = [Math.min(...alone), Math.max(...alone)];
const widest = Math.max(...assignment.map(({ bits }) => bits ?? 0), 1);

/** Draw the map, if there was a search. */
export function start() {
  const search = data.search;
  if (!search) return false;
  const verdict =
    search.met === null ? "" : search.met ? " It was met." : " It could not be met; this is the best that was found.";
  const tried = search.tried.length
    ? ` ${search.tried.length} models were tried on the way; they are the small points above.`
    : "";
  byId("search-about").textContent = `Asked for: ${search.target}.${verdict}${tried}`;
  byId("search-left-out").append(...search.left_out.map((line) => h("li", {}, line)));
  if (!assignment.length) return true;
  if (alone.length) {
    /** @type {[string, string][]} */
    const options = [
      ["bits", "bits"],
      ["kl", "KL of its group alone"],
    ];
    byId("search-controls").append(
      select("Colour by", options, state.by, (value) => {
        state.by = value;
        draw();
      }),
    );
  }
  onWidth(byId("search-map"), (width) => {
    state.width = width;
    draw();
  });
  return true;
}

function draw() {
  const bits = state.by === "bits";
  const map = heatMap(assignment.map(cell), state.width, (text) => {
    byId("search-said").textContent = text;
  });
  const place = byId("search-map");
  place.className = bits ? "heat-bits" : "heat-error";
  const legend = bits ? counts() : scale("heat-error", [[0, significant(least, 2)], [1, `KL ${significant(most, 2)}`]]); // biome-ignore format: short
  place.replaceChildren(h("div", { class: "figure padded" }, map), legend);
}

/** @param {Assigned} assigned */
function cell({ module, precision, bits, kl_alone: kl }) {
  const says = `${module}: ${precision}${kl === null ? "" : `, KL ${significant(kl, 2)} if only its group were so`}`;
  if (state.by === "bits")
    return { module, strength: share(bits), short: bits === null ? precision : String(bits), says };
  const span = Math.log(most / least) || 1;
  return { module, strength: kl !== null && kl > 0 ? Math.log(kl / least) / span : null, short: "", says };
}

/** @param {number | null} bits */
function share(bits) {
  return bits === null ? null : Math.min(Math.log2(bits) / Math.log2(Math.max(widest, 2)), 1);
}

/** How many modules took which precision. */
function counts() {
  const precisions = [...new Set(assignment.map(({ precision }) => precision))];
  const items = precisions.map((precision) => {
    const these = assignment.filter((assigned) => assigned.precision === precision);
    const strength = share(these[0].bits);
    const swatch = h("span", { class: strength === null ? "swatch blank" : "swatch heat-swatch" });
    if (strength !== null) swatch.style.setProperty("--strength", `${Math.round(6 + 94 * strength)}%`);
    return { at: these[0].bits ?? 0, item: h("li", {}, swatch, `${precision}: ${these.length} modules`) };
  });
  items.sort((a, b) => a.at - b.at);
  return h("ul", { class: "legend" }, ...items.map(({ item }) => item));
}
