// Fills the page, part by part; a part without data is taken out.

import { byId } from "../page_base/dom.js";
import { start as startTheme } from "../page_base/theme.js";
import { start as startAbout } from "./about_view.js";
import { start as startLayers } from "./layers_view.js";
import { start as startMemory } from "./memory_view.js";
import { start as startPlot } from "./plot_view.js";
import { start as startSearch } from "./search_view.js";
import { start as startTable } from "./table_view.js";
import { start as startText } from "./text_view.js";
import { start as startWorst } from "./worst_view.js";

/** Each says whether it has something to show. @type {[string, () => boolean][]} */
const PARTS = [
  ["plot", startPlot],
  ["search", startSearch],
  ["layers", startLayers],
  ["memory", startMemory],
  ["text", startText],
  ["worst", startWorst],
];

startTheme();
startAbout();
startTable();
for (const [id, start] of PARTS) {
  if (start()) continue;
  byId(id).remove();
  document.querySelector(`nav a[href="#${id}"]`)?.remove();
}
