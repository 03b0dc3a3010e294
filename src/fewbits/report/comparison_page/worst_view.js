// The places where a model is furthest from the reference.

import { byId, h } from "../page_base/dom.js";
import { chooser, chosen, onChoice } from "./choice.js";
import { data } from "./data.js";
import { significant } from "./figures.js";
import { guesses } from "./guesses.js";
import { has, show } from "./text_view.js";
import { visible } from "./tokens.js";

/** @typedef {import("./data.js").Worst} Worst */

const FIRST = 4;
const state = { all: false };

/** List them, if there are any. */
export function start() {
  if (!data.rows.some((row) => row.worst.length)) return false;
  byId("worst-controls").append(chooser((row) => row.worst.length > 0));
  byId("worst-more").addEventListener("click", () => {
    state.all = true;
    draw();
  });
  onChoice(draw);
  draw();
  return true;
}

function draw() {
  const { worst, label } = chosen();
  const shown = state.all ? worst : worst.slice(0, FIRST);
  byId("worst-list").replaceChildren(...shown.map((place) => card(place, label)));
  if (!worst.length) byId("worst-list").append(h("p", { class: "note" }, `None were recorded of ${label}.`));
  byId("worst-more").hidden = shown.length === worst.length;
  byId("worst-more").textContent = `Show all ${worst.length}`;
}

/** @param {Worst} place @param {string} label */
function card(place, label) {
  const { window, token, kl, context, following } = place;
  const where = `window ${window + 1}, token ${token + 1}`;
  const there = has(window)
    ? h("button", { type: "button", class: "quiet", onclick: () => show(window, token) }, "See in the text")
    : null;
  return h(
    "article",
    { class: "figure padded place", "aria-label": `KL ${significant(kl, 3)}, ${where}` },
    h("header", {}, h("strong", {}, `KL ${significant(kl, 3)}`), h("span", { class: "note" }, where), there),
    h("p", { class: "context" }, `…${visible(context)}`, following ? h("mark", {}, visible(following)) : null),
    guesses(place, label),
  );
}
