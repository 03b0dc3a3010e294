// A small line chart: paths over an axis, with a name to each.

import { s } from "../page_base/dom.js";

/** @typedef {{ name: string, kind: string, values: readonly number[] }} Line */

/**
 * Lines over 0, 1, 2, … steps.
 * @param {number} width @param {number} height @param {readonly Line[]} lines
 * @param {{ low: number, high: number, label: string, steps: number, ticks: readonly number[] }} axis
 */
export function plot(width, height, lines, { low, high, label, steps, ticks }) {
  const [left, right, top, bottom] = [52, 12, 12, 22];
  const x = (/** @type {number} */ step) => left + (step / Math.max(steps, 1)) * (width - left - right);
  const y = (/** @type {number} */ value) => top + ((high - value) / (high - low || 1)) * (height - top - bottom);
  const svg = s("svg", { width, height, viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": label });
  const grid = s("g", { class: "grid" });
  for (const tick of ticks) {
    grid.append(s("path", { d: `M${left} ${y(tick)}H${width - right}` }));
    grid.append(s("text", { x: left - 6, y: y(tick) + 4, "text-anchor": "end" }, String(Number(tick.toPrecision(4)))));
  }
  for (const step of [0, steps / 2, steps]) {
    const anchor = step === steps ? "end" : step ? "middle" : "start";
    grid.append(s("text", { x: x(step), y: height - 5, "text-anchor": anchor }, String(Math.round(step))));
  }
  svg.append(grid);
  for (const line of lines) {
    const every = Math.max(1, Math.floor(line.values.length / width));
    const points = line.values.flatMap((value, step) =>
      step % every && step !== line.values.length - 1 ? [] : [`${x(step).toFixed(1)} ${y(value).toFixed(1)}`],
    );
    svg.append(s("path", { class: `line ${line.kind}`, d: `M${points.join("L")}` }));
  }
  return svg;
}

/** The names of lines, beside samples of them. @param {readonly Line[]} lines */
export function legend(lines) {
  return lines.map((line) => {
    const sample = s(
      "svg",
      { width: 22, height: 10, "aria-hidden": "true" },
      s("path", { class: `line ${line.kind}`, d: "M1 5H21" }),
    );
    const item = document.createElement("li");
    item.append(sample, ` ${line.name}`);
    return item;
  });
}
