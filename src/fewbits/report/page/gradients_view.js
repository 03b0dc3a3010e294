// 4. A histogram of gradients, and the loss scale as a slider: what underflows, what overflows, which scales work.

import { byId, h, onWidth, s, select, slider } from "../page_base/dom.js";
import { data, named } from "./data.js";
import { powerOfTwo } from "./literal.js";
import { judge, scaleWindow, zones } from "./training.js";

/** @typedef {import("./data.js").Histogram} Histogram */
/** @typedef {import("./training.js").Counts} Counts */

const MOST = 30;
const HEIGHT = 230;
const ENDS = /** @type {const} */ ([-44, 20]); // exponents on the chart, scaled

const state = { modules: /** @type {Histogram[]} */ ([]), module: "all", format: "fp16", scale: 0, width: 0 };

/** Build the controls; the built-in histogram comes first. */
export function start() {
  const chart = byId("gradient-chart");
  byId("gradient-controls").append(
    select(
      "Format of the gradients",
      ["fp16", "bf16", "e5m2", "e4m3fn"].map((name) => [name, name]),
      state.format,
      (value) => {
        state.format = value;
        draw();
      },
    ),
    h("span", { id: "gradient-modules" }),
    slider(
      "Loss scale",
      { min: 0, max: MOST, value: 0, id: "loss-scale" },
      (power) => powerOfTwo(power),
      (power) => {
        state.scale = power;
        draw();
      },
    ),
  );
  const field = /** @type {HTMLInputElement} */ (byId("gradient-file"));
  field.addEventListener("change", () => {
    take(field.files?.[0]);
    field.value = ""; // so that the same file, written anew, can be chosen again
  });
  const drop = byId("gradient-drop");
  drop.addEventListener("dragover", (event) => event.preventDefault());
  drop.addEventListener("drop", (event) => {
    event.preventDefault();
    take(/** @type {DragEvent} */ (event).dataTransfer?.files[0]);
  });
  use(data.gradients.modules, data.gradients.what ?? "");
  onWidth(chart, (width) => {
    state.width = width;
    draw();
  });
}

/** @param {File | undefined} file */
async function take(file) {
  if (!file) return;
  try {
    const modules = gradientsOf(JSON.parse(await file.text()));
    use(modules, `${file.name}: ${modules.length} histogram${modules.length > 1 ? "s" : ""} of gradients`);
    byId("gradient-error").textContent = "";
  } catch (error) {
    const why = error instanceof SyntaxError ? "it is no JSON" : /** @type {Error} */ (error).message;
    byId("gradient-error").textContent =
      `${file.name} was not read: ${why}. Take the file that fewbits preflight --json writes.`;
  }
}

/** The gradients in a file of `fewbits preflight --json`. @param {{ modules?: unknown }} report @returns {Histogram[]} */
export function gradientsOf(report) {
  if (!Array.isArray(report?.modules)) throw new Error("it has no modules");
  const rows = report.modules.filter(
    (row) => ["gradient", "weight_gradient"].includes(row?.kind) && typeof row.exponents === "object",
  );
  if (!rows.length) throw new Error("it has no gradients");
  return rows;
}

/** @param {Histogram[]} modules @param {string} what */
function use(modules, what) {
  state.modules = modules;
  state.module = "all";
  byId("gradient-what").textContent = what;
  const names = modules.map(
    (one, index) => /** @type {[string, string]} */ ([String(index), `${one.name}, ${one.kind.replace("_", " ")}`]),
  );
  const choice = select("Module", [["all", "all modules"], ...names], "all", (value) => {
    state.module = value;
    draw();
  });
  byId("gradient-modules").replaceChildren(choice);
  draw();
}

/** The counts of what is chosen, together and for each module. */
function chosen() {
  const rows = state.module === "all" ? state.modules : [state.modules[Number(state.module)]];
  const each = rows.map((row) => ({ counts: countsOf(row), largest: row.largest }));
  /** @type {Counts} */
  const counts = new Map();
  for (const one of each) {
    for (const [exponent, count] of one.counts) counts.set(exponent, (counts.get(exponent) ?? 0) + count);
  }
  return { counts, each, zeros: rows.reduce((sum, row) => sum + (Number(row.zeros) || 0), 0) };
}

/** @param {Histogram} row @returns {Counts} */
function countsOf(row) {
  return new Map(Object.entries(row.exponents).map(([exponent, count]) => [Number(exponent), Number(count)]));
}

function draw() {
  if (!state.width) return;
  const { counts, each, zeros } = chosen();
  const fmt = named(state.format);
  const share = judge(counts, fmt, state.scale);
  const works = scaleWindow(each, fmt, MOST);
  byId("gradient-chart").replaceChildren(histogram(counts));
  byId("gradient-window").replaceChildren(windowBar(works));
  const shown = (/** @type {number} */ part) => `${(100 * part).toPrecision(part < 0.0995 ? 2 : 3)} %`;
  const said = [
    ["becomes 0", share.zero, "bad"],
    ["subnormal", share.subnormal, "meh"],
    ["normal", share.normal, "good"],
    ["overflows", share.over, "bad"],
  ];
  byId("gradient-said").replaceChildren(
    ...said.map(([name, part, kind]) =>
      h("li", { class: Number(part) > 0 ? String(kind) : "" }, h("strong", {}, shown(Number(part))), ` ${name}`),
    ),
  );
  const window = works
    ? `Loss scales from ${powerOfTwo(works[0])} to ${powerOfTwo(works[1])} work.`
    : "No loss scale works for all of them: what is large overflows before what is small is kept.";
  byId("gradient-verdict").textContent =
    `${window}${zeros ? ` ${zeros.toLocaleString("en")} gradients are 0 already.` : ""}`;
}

const x = (/** @type {number} */ exponent) =>
  ((Math.min(Math.max(exponent, ENDS[0]), ENDS[1]) - ENDS[0]) / (ENDS[1] - ENDS[0])) * state.width;

/** @param {Counts} counts */
function histogram(counts) {
  const svg = s("svg", {
    width: state.width,
    height: HEIGHT,
    role: "img",
    "aria-label": "Gradients times the loss scale, by their power of two",
  });
  const { zeroTo, normalFrom, overFrom } = zones(named(state.format));
  const [zero, normal, over] = [zeroTo, normalFrom, overFrom].map((edge) => x(Math.log2(edge)));
  const floor = HEIGHT - 22;
  const band = (
    /** @type {string} */ kind,
    /** @type {number} */ from,
    /** @type {number} */ to,
    /** @type {string} */ label,
  ) => {
    if (to - from < 1) return;
    svg.append(s("rect", { class: `zone ${kind}`, x: from, y: 0, width: to - from, height: floor }));
    if (to - from > label.length * 6.6)
      svg.append(s("text", { x: from + 6, y: 15, class: `zone-name ${kind}` }, label));
  };
  band("bad", 0, zero, "becomes 0");
  band("meh", zero, normal, "subnormal");
  band("good", normal, over, "normal");
  band("bad", over, state.width, "overflows");
  const most = Math.max(...counts.values(), 1);
  for (const [exponent, count] of counts) {
    const [left, right] = [x(exponent + state.scale), x(exponent + state.scale + 1)];
    const height = (floor - 26) * Math.sqrt(count / most);
    const middle = (left + right) / 2;
    const kind = middle < zero || middle >= over ? "bad" : middle < normal ? "meh" : "good";
    if (right > left)
      svg.append(
        s("rect", {
          class: `hist ${kind}`,
          x: left + 0.5,
          y: floor - height,
          width: Math.max(right - left - 1, 1),
          height,
        }),
      );
  }
  const grid = s("g", { class: "grid" });
  for (let power = -40; power <= 16; power += state.width < 500 ? 16 : 8) {
    grid.append(s("text", { x: x(power), y: HEIGHT - 6, "text-anchor": "middle" }, power ? powerOfTwo(power) : "1"));
  }
  svg.append(grid);
  return svg;
}

/** The scales that work, under the slider. @param {[number, number] | null} works */
function windowBar(works) {
  const svg = s("svg", {
    width: "100%",
    height: 10,
    viewBox: `0 0 ${MOST} 10`,
    preserveAspectRatio: "none",
    "aria-hidden": "true",
  });
  svg.append(s("rect", { class: "window-rail", x: 0, y: 3, width: MOST, height: 4 }));
  if (works)
    svg.append(s("rect", { class: "window", x: works[0], y: 1, width: Math.max(works[1] - works[0], 0.4), height: 8 }));
  return svg;
}
