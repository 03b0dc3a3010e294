// The model that is looked at: one for the whole page, chosen anywhere.

import { select } from "../page_base/dom.js";
import { data } from "./data.js";

/** @typedef {import("./data.js").Row} Row */

/** @type {(() => void)[]} */
const listeners = [];
let at = data.chosen;

/** Which row is chosen. */
export const chosenIndex = () => at;

/** @returns {Row} */
export const chosen = () => data.rows[at];

/** @param {number} index */
export function choose(index) {
  at = index;
  for (const listener of listeners) listener();
}

/** Call this whenever another is chosen. @param {() => void} listener */
export function onChoice(listener) {
  listeners.push(listener);
}

/** A select of the models that have something to show. @param {(row: Row) => boolean} has */
export function chooser(has) {
  /** @type {[string, string][]} */
  const options = data.rows.flatMap((row, index) => (has(row) ? [[String(index), row.label]] : []));
  const field = select("Model", options, String(at), (value) => choose(Number(value)));
  const list = /** @type {HTMLSelectElement} */ (field.querySelector("select"));
  const show = () => {
    list.value = String(at); // none, where the chosen one has nothing to show here
  };
  show();
  onChoice(show);
  return field;
}
