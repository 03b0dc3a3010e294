// 2. Range against precision: a row for each format, as long as the powers of two that it spans, as high as its
// significant bits. Below the smallest normal value the row tapers: a bit less for each power of two.

import { byId, onWidth, s } from "../page_base/dom.js";
import { catalog, named } from "./data.js";
import { span } from "./spans.js";

/** @typedef {import("./spans.js").Span} Span */

const NEAR = /** @type {const} */ ([-160, 136]); // what all but fp64 need
const FAR = /** @type {const} */ ([-1120, 1060]);
const BIT = 1.15; // px for each significant bit

/** Draw the chart, and again when its width changes or the far ends are wanted. */
export function start() {
  const chart = byId("range-chart");
  const far = byId("range-far");
  let wide = false;
  let width = 0;
  const draw = () => chart.replaceChildren(drawing(width, wide ? FAR : NEAR));
  far.addEventListener("click", () => {
    wide = !wide;
    far.setAttribute("aria-pressed", String(wide));
    draw();
  });
  onWidth(chart, (now) => {
    width = now;
    draw();
  });
}

/** @param {number} width @param {readonly [number, number]} ends */
function drawing(width, ends) {
  const names = width < 600 ? 84 : 104;
  const x = (/** @type {number} */ exponent) => {
    const inside = Math.min(Math.max(exponent, ends[0]), ends[1]);
    return names + ((inside - ends[0]) / (ends[1] - ends[0])) * (width - names - 34);
  };
  let y = 22;
  const rows = [];
  for (const fmt of catalog) {
    const of = span(fmt, named);
    const height = Math.max(of.bits * BIT, 3);
    const room = Math.max(height + 5, 17);
    y += room;
    rows.push(row(of, x, y, height, fmt.row.kind === "codebook"));
  }
  const title = "Every format: the powers of two that it spans, and its significant bits";
  return s(
    "svg",
    { width, height: y + 12, viewBox: `0 0 ${width} ${y + 12}`, role: "img", "aria-label": title },
    axis(ends, x, y, width < 600),
    ...rows,
  );
}

/** @param {readonly [number, number]} ends @param {(exponent: number) => number} x @param {number} bottom @param {boolean} narrow */
function axis(ends, x, bottom, narrow) {
  const step = (ends === FAR ? 256 : 32) * (narrow ? 2 : 1);
  const group = s("g", { class: "grid" });
  for (let power = Math.ceil(ends[0] / step) * step; power <= ends[1]; power += step) {
    const label = power === 0 ? "1" : "2";
    group.append(s("path", { d: `M${x(power)} 20V${bottom + 4}`, class: power === 0 ? "zero" : "" }));
    const text = s("text", { x: x(power), y: 13, "text-anchor": "middle" }, label);
    if (power) text.append(s("tspan", { dy: -4, class: "power" }, String(power).replace("-", "−")));
    group.append(text);
  }
  return group;
}

/** @param {Span} of @param {(exponent: number) => number} x @param {number} y the base @param {number} height @param {boolean} plain */
function row(of, x, y, height, plain) {
  const [left, knee, right] = [x(of.least), x(of.normal), Math.max(x(of.most + 0.99), x(of.least) + 2)];
  const per = height / of.bits;
  const words = `${of.name}: 2^${of.least.toFixed(0)} to 2^${of.most.toFixed(1)}, ${of.bits} significant bits`;
  const group = s("g", { class: "span", "data-format": of.name, tabindex: -1 }, s("title", {}, words));
  group.append(s("text", { x: x(-Infinity) - 8, y: y - 1, "text-anchor": "end", class: "name" }, of.name));
  if (knee > left && !plain) {
    group.append(s("path", { class: "subnormal", d: `M${left} ${y}V${y - per}L${knee} ${y - height}V${y}Z` }));
  }
  const from = plain ? left : knee;
  group.append(
    s("rect", {
      class: of.block ? "normal scaled" : "normal",
      x: from,
      y: y - height,
      width: Math.max(right - from, 1),
      height,
    }),
  );
  if (of.block) {
    const [low, high] = [x(of.block[0]), x(of.block[1])];
    group.append(s("rect", { class: "one-block", x: low, y: y - height, width: Math.max(high - low, 2), height }));
  }
  group.append(s("text", { x: x(Infinity) + 8, y: y - 1, class: "count" }, String(of.bits)));
  return group;
}
