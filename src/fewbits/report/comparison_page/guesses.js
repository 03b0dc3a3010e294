// What two models would have said at one place, side by side.

import { h } from "../page_base/dom.js";
import { NONE } from "./figures.js";
import { quoted } from "./tokens.js";

/** @typedef {import("./data.js").Worst} Worst */
/** @typedef {import("./data.js").Guess} Guess */

/** @param {Worst} worst @param {string} name of the model */
export function guesses(worst, name) {
  return h("div", { class: "guesses" }, list("The reference", worst.reference), list(name, worst.candidate));
}

/** @param {string} name @param {readonly Guess[]} guessed */
function list(name, guessed) {
  const items = guessed.map(([token, probability]) => {
    const bar = h("i", { "aria-hidden": "true" });
    bar.style.width = `${100 * (probability ?? 0)}%`;
    const share = probability === null ? NONE : `${(100 * probability).toFixed(probability < 0.0995 ? 1 : 0)} %`;
    return h("li", {}, bar, h("code", {}, quoted(token)), h("span", {}, share));
  });
  return h("div", {}, h("h4", {}, name), h("ol", {}, ...items));
}
