// 2. The number line: every value of a format is a tick. Where ticks would touch, their density is a shade instead.

import { byId, h, onWidth, s, toggles } from "../page_base/dom.js";
import { ordinals, ordinalValue } from "./codec.js";
import { named } from "./data.js";
import { toNumber } from "./rational.js";

/** @typedef {import("./format.js").Format} Format */

const NAMES = ["fp16", "bf16", "e4m3fn", "e5m2", "e2m1fn"];
const ROW = 44;
const APART = 3; // px between ticks, at least
/** What the buttons show. @type {[string, number, number][]} */
const PLACES = [
  ["−8 … 8", -8, 8],
  ["0 … 1", 0, 1],
  ["around 1", 0.9, 1.1],
  ["256 … 512", 256, 512],
  ["all of e4m3", -464, 464],
  ["near 0", -0.004, 0.004],
];
const NARROWEST = 2 ** -40;

const view = { low: -8, high: 8, width: 0, on: new Set(NAMES) };
/** @type {Map<string, Float64Array>} */
const values = new Map();

/** Build the buttons and the chart; wheel, drag, pinch and keys move it. */
export function start() {
  const chart = byId("line-chart");
  for (const [label, low, high] of PLACES) {
    byId("line-places").append(h("button", { type: "button", class: "chip", onclick: () => go(low, high) }, label));
  }
  byId("line-places").append(
    h("button", { type: "button", class: "chip", "aria-label": "Zoom in", onclick: () => zoom(0.5, 0.5) }, "+"),
    h("button", { type: "button", class: "chip", "aria-label": "Zoom out", onclick: () => zoom(2, 0.5) }, "−"),
  );
  byId("line-formats").append(toggles("Formats on the number line", NAMES, view.on, draw));
  chart.addEventListener(
    "wheel",
    (event) => {
      if (!event.ctrlKey && !event.shiftKey && document.activeElement !== chart) return; // leave scrolling alone
      event.preventDefault();
      zoom(event.deltaY > 0 ? 1.2 : 1 / 1.2, (event.offsetX ?? 0) / view.width);
    },
    { passive: false },
  );
  chart.addEventListener("dblclick", (event) => zoom(0.4, event.offsetX / view.width));
  chart.addEventListener("keydown", keys);
  drag(chart);
  onWidth(chart, (width) => {
    view.width = width;
    draw();
  });
}

/** @param {KeyboardEvent} event */
function keys(event) {
  const shift = (view.high - view.low) / 8;
  /** @type {Record<string, () => void>} */
  const actions = {
    ArrowLeft: () => go(view.low - shift, view.high - shift),
    ArrowRight: () => go(view.low + shift, view.high + shift),
    ArrowUp: () => zoom(0.5, 0.5),
    ArrowDown: () => zoom(2, 0.5),
    "+": () => zoom(0.5, 0.5),
    "-": () => zoom(2, 0.5),
  };
  if (!(event.key in actions)) return;
  event.preventDefault();
  actions[event.key]();
}

/** One pointer moves the line, two pinch it. @param {HTMLElement} chart */
function drag(chart) {
  /** @type {Map<number, number>} */
  const down = new Map();
  chart.addEventListener("pointerdown", (event) => {
    down.set(event.pointerId, event.offsetX);
    chart.setPointerCapture(event.pointerId);
  });
  chart.addEventListener("pointermove", (event) => {
    const before = down.get(event.pointerId);
    if (before === undefined) return;
    const others = [...down].filter(([id]) => id !== event.pointerId);
    if (others.length) {
      const [, still] = others[0];
      const ratio = Math.abs(before - still) / Math.max(Math.abs(event.offsetX - still), 1);
      zoom(Math.min(Math.max(ratio, 0.5), 2), still / view.width);
    } else {
      const moved = ((before - event.offsetX) / view.width) * (view.high - view.low);
      go(view.low + moved, view.high + moved);
    }
    down.set(event.pointerId, event.offsetX);
  });
  for (const end of ["pointerup", "pointercancel"]) {
    chart.addEventListener(end, (event) => down.delete(/** @type {PointerEvent} */ (event).pointerId));
  }
}

/** @param {number} factor below 1 goes nearer @param {number} at the place that stays, 0 left to 1 right */
function zoom(factor, at) {
  const width = view.high - view.low;
  const now = Math.min(Math.max(width * factor, NARROWEST), 2 ** 18);
  const fixed = view.low + at * width;
  go(fixed - at * now, fixed + (1 - at) * now);
}

/** @param {number} low @param {number} high */
function go(low, high) {
  [view.low, view.high] = [low, high];
  draw();
}

function draw() {
  if (!view.width) return;
  const names = NAMES.filter((name) => view.on.has(name));
  const height = 26 + names.length * ROW;
  const chart = s("svg", { width: view.width, height, viewBox: `0 0 ${view.width} ${height}`, "aria-hidden": "true" });
  chart.append(axis(height));
  chart.append(...names.map((name, index) => row(named(name), 28 + index * ROW)));
  byId("line-chart").replaceChildren(chart);
  byId("line-chart").setAttribute("aria-valuenow", String((view.low + view.high) / 2));
  byId("line-chart").setAttribute("aria-valuetext", `from ${view.low} to ${view.high}`);
  byId("line-said").textContent = names
    .map((name) => `${name} ${between(listed(named(name)), view.low, view.high)}`)
    .join(", ");
}

const x = (/** @type {number} */ value) => ((value - view.low) / (view.high - view.low)) * view.width;

/** @param {number} height */
function axis(height) {
  const group = s("g", { class: "grid" });
  const about = (view.high - view.low) / Math.max(view.width / 110, 3);
  const step = 2 ** Math.round(Math.log2(about)); // powers of two: the ticks fall on values
  for (let at = Math.ceil(view.low / step) * step; at <= view.high; at += step) {
    const digits = Math.max(0, Math.min(20, -Math.floor(Math.log2(step))));
    const text =
      Math.abs(at) < step / 2
        ? "0"
        : Number(at.toFixed(digits))
            .toPrecision(12)
            .replace(/\.?0+$/, "");
    group.append(s("path", { d: `M${x(at)} 18V${height}`, class: Math.abs(at) < step / 2 ? "zero" : "" }));
    if (x(at) < 20 || x(at) > view.width - 20) continue;
    group.append(s("text", { x: x(at), y: 12, "text-anchor": "middle" }, text.replace("-", "−")));
  }
  return group;
}

/** @param {Format} fmt @param {number} top */
function row(fmt, top) {
  const all = listed(fmt);
  const group = s("g", { class: "line-row", "data-format": fmt.name });
  const count = between(all, view.low, view.high);
  const words = `${fmt.name}  ${count.toLocaleString("en")} value${count === 1 ? "" : "s"} here`;
  const base = top + 38;
  group.append(s("path", { class: "axis", d: `M0 ${base}H${view.width}` }));
  let ticks = "";
  let at = position(all, view.low);
  const end = at + count;
  while (at < end) {
    const left = x(all[at]);
    if (at + 1 >= all.length || x(all[at + 1]) - left >= APART) {
      ticks += `M${left.toFixed(1)} ${base}v-18`;
      at += 1;
      continue;
    }
    const next = Math.min(position(all, all[at] + (APART / view.width) * (view.high - view.low)), all.length - 1);
    group.append(shade(left, x(all[next]) - left, base, next - at));
    at = next;
  }
  group.append(
    s("path", { class: "ticks", d: ticks || "M0 0" }),
    s("text", { x: 2, y: top + 14, class: "name" }, words),
  );
  return group;
}

/** A column that stands for so many values. @param {number} left @param {number} width @param {number} base @param {number} count */
function shade(left, width, base, count) {
  const weight = Math.min(0.2 + 0.08 * Math.log2((count / width) * APART), 1).toFixed(2);
  return s("rect", {
    class: "dense",
    x: left.toFixed(2),
    y: base - 18,
    width: width.toFixed(2),
    height: 18,
    opacity: weight,
  });
}

/** All finite values, ascending; formats up to 16 bits. @param {Format} fmt */
function listed(fmt) {
  const known = values.get(fmt.name);
  if (known) return known;
  const { least, most } = ordinals(fmt);
  const all = Float64Array.from({ length: Number(most - least) + 1 }, (_, index) =>
    toNumber(ordinalValue(least + BigInt(index), fmt)),
  );
  values.set(fmt.name, all);
  return all;
}

/** How many values are below a number. @param {Float64Array} all @param {number} value */
function position(all, value) {
  let [low, high] = [0, all.length];
  while (low < high) {
    const middle = (low + high) >> 1;
    if (all[middle] < value) low = middle + 1;
    else high = middle;
  }
  return low;
}

/** @param {Float64Array} all @param {number} low @param {number} high */
function between(all, low, high) {
  return position(all, high + Number.EPSILON * Math.abs(high)) - position(all, low);
}
