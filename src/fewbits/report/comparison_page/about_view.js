// What was measured, what a reader has to know before the figures, and on which machine.

import { byId, h } from "../page_base/dom.js";
import { data } from "./data.js";

/** Fill the first lines and the last. */
export function start() {
  byId("about").textContent = data.about;
  byId("notes").append(...data.notes.map((note) => h("li", {}, note)));
  byId("made").append(...data.made.map((line) => h("p", {}, line)));
}
