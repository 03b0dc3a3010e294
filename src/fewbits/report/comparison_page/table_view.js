// The summary: one model a row. A heading sorts, a name chooses.

import { byId, h } from "../page_base/dom.js";
import { choose, chosenIndex, onChoice } from "./choice.js";
import { data } from "./data.js";
import { bytes, fixed, perplexity, significant, withError } from "./figures.js";

/** @typedef {import("./data.js").Row} Row */
/** @typedef {{ name: string, unit: string, key: (row: Row) => number | string | null, text: (row: Row) => string }} Column */

/** @type {Column[]} */
const COLUMNS = [
  { name: "Model", unit: "", key: (row) => row.label, text: (row) => row.label },
  { name: "Precision", unit: "", key: (row) => row.precision, text: (row) => row.precision },
  { name: "Bits", unit: "per weight", key: (row) => row.bits_per_weight, text: (row) => fixed(row.bits_per_weight, 2) },
  { name: "Disk", unit: "weights", key: (row) => row.disk_bytes, text: (row) => bytes(row.disk_bytes) },
  { name: "Memory", unit: "weights", key: (row) => row.memory_bytes, text: (row) => bytes(row.memory_bytes) },
  { name: "KL", unit: "nats/token", key: (row) => row.kl, text: (row) => withError(row.kl, row.kl_stderr, 4) },
  { name: "Top-1", unit: "% the same", key: (row) => row.top1, text: (row) => percent(row.top1, row.top1_stderr) },
  {
    name: "Perplexity",
    unit: "",
    key: (row) => row.perplexity,
    text: (row) => perplexity(row.perplexity, row.perplexity_stderr),
  },
  { name: "Prefill", unit: "tokens/s", key: (row) => row.prefill_tps, text: (row) => significant(row.prefill_tps) },
  { name: "Decode", unit: "tokens/s", key: (row) => row.decode_tps, text: (row) => significant(row.decode_tps) },
];

/** No column is sorted by at first: the rows come as they were measured. */
const sorted = { column: -1, up: true };
const order = data.rows.map((_, index) => index);

/** Build the table. */
export function start() {
  const heads = shown().map((column) => {
    const button = h("button", { type: "button" }, column.name, column.unit ? h("small", {}, column.unit) : null);
    button.addEventListener("click", () => sort(COLUMNS.indexOf(column)));
    return h("th", { scope: "col", "aria-sort": "none", "data-column": column.name }, button);
  });
  const body = h("tbody");
  byId("summary-table").append(h("table", { class: "summary" }, h("thead", {}, h("tr", {}, ...heads)), body));
  fill();
  onChoice(fill);
}

/** The columns in which a model has a figure. */
function shown() {
  return COLUMNS.filter((column) => data.rows.some((row) => column.key(row) !== null && column.key(row) !== ""));
}

/** Up, then down, then as measured. @param {number} column */
function sort(column) {
  if (sorted.column !== column) Object.assign(sorted, { column, up: true });
  else if (sorted.up) sorted.up = false;
  else sorted.column = -1;
  order.sort((a, b) => (sorted.column < 0 ? a - b : compare(a, b)));
  fill();
}

/** Rows without a figure come last, both ways. @param {number} a @param {number} b */
function compare(a, b) {
  const [one, other] = [a, b].map((index) => COLUMNS[sorted.column].key(data.rows[index]));
  if (one === null || other === null) return Number(one === null) - Number(other === null) || a - b;
  const less = typeof one === "string" ? one.localeCompare(String(other)) : one - Number(other);
  return (sorted.up ? less : -less) || a - b;
}

function fill() {
  const table = byId("summary-table");
  for (const head of table.querySelectorAll("th[data-column]")) {
    const here = COLUMNS[sorted.column]?.name === head.getAttribute("data-column");
    head.setAttribute("aria-sort", here ? (sorted.up ? "ascending" : "descending") : "none");
  }
  const focused = document.activeElement?.getAttribute("data-choose");
  table.querySelector("tbody")?.replaceChildren(...order.map(line));
  if (focused) /** @type {HTMLElement | null} */ (table.querySelector(`[data-choose="${focused}"]`))?.focus();
}

/** @param {number} index */
function line(index) {
  const row = data.rows[index];
  const chosen = index === chosenIndex();
  const name = h(
    "button",
    { type: "button", "data-choose": index, "aria-pressed": String(chosen), onclick: () => choose(index) },
    row.label,
  );
  const cells = shown().map((column) =>
    column.name === "Model" ? h("th", { scope: "row" }, name) : cell(column, row),
  );
  return h("tr", { class: chosen ? "chosen" : null, "data-row": row.label }, ...cells);
}

/** @param {Column} column @param {Row} row */
function cell(column, row) {
  const [value, error] = column.text(row).split(" ± ");
  return h(
    "td",
    { class: column.name === "Precision" ? "word" : null },
    value,
    error ? h("small", {}, ` ± ${error}`) : null,
  );
}

/** @param {number | null} share @param {number | null} error */
function percent(share, error) {
  return withError(share === null ? null : 100 * share, error === null ? null : 100 * error, 1);
}
