// 3. Blocks: 32 values that share scales. One is dragged up, the scale follows it, and the others lose their bits.

import { byId, h, onWidth, s, select, slider } from "../page_base/dom.js";
import { data, named } from "./data.js";
import { approximate } from "./literal.js";
import { fromNumber } from "./rational.js";
import { strip } from "./strip_view.js";

/** @typedef {import("./block.js").Scheme} Scheme */

const COUNT = 32;
const MOST = 100;
const HEIGHT = 190;
const BLOCKS = ["mxfp8", "mxfp4", "nvfp4"];

/** Ordinary weights: normally distributed, the same at every visit. */
const ORDINARY = Array.from({ length: COUNT }, (_, index) => {
  const [u, v] = [((index * 73 + 11) % 97) / 97, ((index * 37 + 5) % 89) / 89];
  return Math.round(Math.sqrt(-2 * Math.log(u + 0.004)) * Math.cos(2 * Math.PI * v) * 0.8 * 256) / 256;
});

const state = { values: [...ORDINARY], chosen: 6, width: 0, rule: "" };
const RULE_TEXT = new Map([
  ["floor", "floor: OCP MX, the largest may saturate"],
  ["ceil", "ceil: nothing saturates"],
  ["even", "even: rounded first"],
  ["rceil", "rceil: cuBLAS, the smallest that fits"],
]);

/** @returns {Scheme[]} */
function schemes() {
  const blocks = BLOCKS.map((name) => {
    const fmt = named(name);
    const { size, scale, tensor_scale } = fmt.row.block ?? { size: COUNT, scale: "fp32", tensor_scale: null };
    const tensorScale = tensor_scale === null ? null : named(tensor_scale);
    return { name, element: fmt, size, scale: named(scale), tensorScale, divisor: null, lowest: null };
  });
  const groups = data.groups.map((group) => ({
    name: `${group.name}, groups of ${group.size}`,
    element: named(group.name),
    size: group.size,
    scale: named(group.scale),
    tensorScale: null,
    divisor: fromNumber(group.divisor),
    lowest: BigInt(group.lowest),
  }));
  return [...blocks, ...groups];
}

/** Build the controls, the bars and a strip for each scheme. */
export function start() {
  const chart = byId("block-chart");
  const control = slider("The chosen value", { min: -100, max: 100, value: 0, id: "block-value" }, says, (at) =>
    set(state.chosen, unscaled(at / 100)),
  );
  const presets = h("div", { class: "chips" });
  /** @type {[string, () => void][]} */
  const choices = [
    ["Ordinary weights", () => state.values.splice(0, COUNT, ...ORDINARY)],
    [
      "One outlier",
      () => state.values.splice(0, COUNT, ...ORDINARY.map((value, index) => (index === state.chosen ? 40 : value))),
    ],
    ["Other weights", () => state.values.splice(0, COUNT, ...ORDINARY.map(() => Math.round(gauss() * 256) / 256))],
  ];
  for (const [label, act] of choices) {
    const click = () => {
      act();
      draw();
    };
    presets.append(h("button", { type: "button", class: "chip", onclick: click }, label));
  }
  const rules = data.scale_rules[BLOCKS[0]].map((name) => /** @type {const} */ ([name, RULE_TEXT.get(name) ?? name]));
  state.rule = rules[0][0];
  const rule = select("Scale of MX blocks", rules, state.rule, (value) => {
    state.rule = value;
    draw();
  });
  byId("block-controls").append(presets, control, rule);
  chart.addEventListener("pointerdown", (event) => grab(chart, event));
  chart.addEventListener("keydown", keys);
  onWidth(chart, (width) => {
    state.width = width;
    draw();
  });
}

const gauss = () => Math.sqrt(-2 * Math.log(Math.random() || 0.5)) * Math.cos(2 * Math.PI * Math.random());
const says = (/** @type {number} */ at) => approximate(fromNumber(unscaled(at / 100)), 4);

// The axis is linear near 0 and logarithmic far from it, so that an outlier and the rest are both to be seen.
const scaled = (/** @type {number} */ value) => Math.asinh(value * 2) / Math.asinh(MOST * 2);
const unscaled = (/** @type {number} */ at) => Math.round((Math.sinh(at * Math.asinh(MOST * 2)) / 2) * 256) / 256;

/** @param {HTMLElement} chart @param {PointerEvent} event */
function grab(chart, event) {
  const place = (/** @type {PointerEvent} */ now) => {
    const box = chart.getBoundingClientRect();
    return { across: (now.clientX - box.left) / box.width, up: 1 - (2 * (now.clientY - box.top)) / HEIGHT };
  };
  state.chosen = Math.min(Math.max(Math.floor(place(event).across * COUNT), 0), COUNT - 1);
  chart.setPointerCapture(event.pointerId);
  const move = (/** @type {PointerEvent} */ now) =>
    set(state.chosen, unscaled(Math.min(Math.max(place(now).up, -1), 1)));
  const end = () => chart.removeEventListener("pointermove", move);
  chart.addEventListener("pointermove", move);
  chart.addEventListener("pointerup", end, { once: true });
  chart.addEventListener("pointercancel", end, { once: true });
  draw();
}

/** @param {KeyboardEvent} event */
function keys(event) {
  const along = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
  const up = { ArrowUp: 0.02, ArrowDown: -0.02, PageUp: 0.1, PageDown: -0.1 }[event.key];
  if (along !== undefined) {
    state.chosen = (state.chosen + along + COUNT) % COUNT;
    draw();
  } else if (up !== undefined) {
    set(state.chosen, unscaled(Math.min(Math.max(scaled(state.values[state.chosen]) + up, -1), 1)));
  } else return;
  event.preventDefault();
}

/** @param {number} index @param {number} value */
function set(index, value) {
  state.values[index] = value;
  draw();
}

function draw() {
  if (!state.width) return;
  const chart = byId("block-chart");
  const value = state.values[state.chosen];
  chart.replaceChildren(bars());
  const said = `value ${state.chosen + 1} of ${COUNT}: ${approximate(fromNumber(value), 5)}`;
  chart.setAttribute("aria-valuenow", String(value));
  chart.setAttribute("aria-valuetext", said);
  byId("block-said").textContent = said;
  const field = /** @type {HTMLInputElement} */ (byId("block-value"));
  field.value = String(Math.round(scaled(value) * 100));
  const output = field.parentElement?.querySelector("output");
  if (output) output.textContent = approximate(fromNumber(value), 4);
  byId("block-strips").replaceChildren(...schemes().map((scheme) => strip(scheme, state)));
}

function bars() {
  const [step, middle] = [state.width / COUNT, HEIGHT / 2];
  const svg = s("svg", { width: state.width, height: HEIGHT, "aria-hidden": "true" });
  const grid = s("g", { class: "grid" });
  for (const level of [-100, -10, -1, 0, 1, 10, 100]) {
    const y = middle - scaled(level) * (middle - 8);
    grid.append(s("path", { d: `M0 ${y}H${state.width}`, class: level ? "" : "zero" }));
    if (level) grid.append(s("text", { x: 2, y: y - 2 }, String(level).replace("-", "−")));
  }
  svg.append(grid);
  state.values.forEach((value, index) => {
    const y = middle - scaled(value) * (middle - 8);
    const shape = {
      x: index * step + step * 0.18,
      y: Math.min(y, middle),
      width: step * 0.64,
      height: Math.max(Math.abs(y - middle), 1),
    };
    svg.append(s("rect", { ...shape, rx: 1.5, class: index === state.chosen ? "bar chosen" : "bar" }));
  });
  return svg;
}
