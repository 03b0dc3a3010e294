// Size against KL divergence: every model a point, the Pareto front a stepped line.

import { byId, h, onWidth, s, select } from "../page_base/dom.js";
import { decades, doublings, powerOfTen } from "./axis.js";
import { choose, chosenIndex, onChoice } from "./choice.js";
import { data } from "./data.js";
import { bytes, fixed, perplexity, significant, withError } from "./figures.js";
import { front, placeLabel } from "./front.js";

/** @typedef {import("./data.js").Row} Row */
/** @typedef {{ name: string, of: (row: Row) => number | null, tick: (value: number) => string }} Axis */
/** @typedef {{ index: number, row: Row, x: number, y: number }} Point */

/** @type {Record<string, Axis>} */
const AXES = {
  bits: { name: "bits per weight", of: (row) => row.bits_per_weight, tick: (value) => significant(value) },
  disk: { name: "bytes on disk", of: (row) => row.disk_bytes, tick: bytes },
  memory: { name: "bytes of weights in memory", of: (row) => row.memory_bytes, tick: bytes },
};
const [LEFT, RIGHT, TOP, BOTTOM, ZERO] = [58, 18, 16, 40, 34];
const LONGEST = 26; // characters of a name beside its point

const state = { axis: "bits", width: 0 };

/** Draw the plot, if there are two points. */
export function start() {
  const usable = Object.entries(AXES).filter(([, axis]) => {
    const rows = data.rows.filter((row) => placed(row, axis));
    return rows.length + tried(axis).length > 1 && (rows.some((row) => row.kl) || tried(axis).length > 0);
  });
  if (!usable.length) return false;
  state.axis = usable[0][0];
  /** @type {[string, string][]} */
  const options = usable.map(([key, axis]) => [key, axis.name]);
  byId("plot-controls").append(
    select("Size in", options, state.axis, (value) => {
      state.axis = value;
      draw();
    }),
  );
  onWidth(byId("plot-chart"), (width) => {
    state.width = width;
    draw();
  });
  onChoice(draw);
  return true;
}

/** @param {Row} row @param {Axis} axis */
function placed(row, axis) {
  return row.kl !== null && row.kl >= 0 && (axis.of(row) ?? 0) > 0;
}

/** What a search tried, where there is a place for it. @param {Axis} axis */
function tried(axis) {
  return axis === AXES.bits ? (data.search?.tried ?? []).filter(({ bits, kl }) => bits > 0 && kl > 0) : [];
}

function draw() {
  if (!state.width) return;
  const axis = AXES[state.axis];
  const rows = data.rows.map((row, index) => ({ row, index })).filter(({ row }) => placed(row, axis));
  const attempts = tried(axis);
  const { x, y, frame, ticks } = scales(rows.map(({ row }) => row), axis, attempts); // biome-ignore format: as it is read
  const points = rows.map(({ row, index }) => ({
    index,
    row,
    x: x(axis.of(row) ?? 0),
    y: y(row.kl ?? 0),
  }));
  const svg = s("svg", {
    width: state.width,
    height: frame.height,
    viewBox: `0 0 ${state.width} ${frame.height}`,
    role: "group",
    "aria-label": `KL divergence by ${axis.name}`,
  });
  svg.append(grid(axis, ticks, x, y, frame), target(y, frame), steps(points, frame));
  svg.append(...attempts.map(({ bits, kl }) => s("circle", { class: "tried", cx: x(bits), cy: y(kl), r: 3 })));
  svg.append(...named(points, frame, y));
  const focused = document.activeElement?.getAttribute("data-point");
  byId("plot-chart").replaceChildren(svg);
  if (focused) /** @type {SVGElement | null} */ (svg.querySelector(`[data-point="${focused}"]`))?.focus();
  if (data.rows.length) say(data.rows[chosenIndex()]);
  const missing = data.rows.filter((row) => !placed(row, axis)).map((row) => row.label);
  byId("plot-missing").textContent = missing.length
    ? `Without a place here, for want of a finite KL or a size: ${missing.join(", ")}.`
    : "";
}

/** @param {readonly Row[]} rows @param {Axis} axis @param {readonly { bits: number, kl: number }[]} tried */
function scales(rows, axis, tried) {
  const height = state.width < 560 ? 340 : 420;
  const sizes = [...rows.map((row) => axis.of(row) ?? 1), ...tried.map(({ bits }) => bits)];
  const [low, high] = [Math.min(...sizes) / 1.18, Math.max(...sizes) * 1.18];
  const losses = [...rows.flatMap((row) => (row.kl ? [row.kl] : [])), ...tried.map(({ kl }) => kl)];
  if (data.search?.max_kl) losses.push(data.search.max_kl);
  const powers = decades(losses);
  const [least, most] = [Math.log10(powers[0]), Math.log10(powers[powers.length - 1])];
  const none = rows.some((row) => row.kl === 0); // no logarithm: on a line of its own below the scale
  const bottom = height - BOTTOM - (none ? ZERO : 0);
  const frame = { left: LEFT, right: state.width - RIGHT, top: TOP, bottom, height, zero: none ? bottom + ZERO : null };
  const x = (/** @type {number} */ size) => LEFT + (Math.log(size / low) / Math.log(high / low)) * (frame.right - LEFT);
  const y = (/** @type {number} */ kl) =>
    kl > 0 ? bottom - ((Math.log10(kl) - least) / (most - least)) * (bottom - TOP) : bottom + ZERO;
  return { x, y, frame, ticks: { sizes: doublings(low, high), powers } };
}

/** @typedef {ReturnType<typeof scales>["frame"]} Frame */

/** @param {Axis} axis @param {{ sizes: number[], powers: number[] }} ticks @param {(v: number) => number} x
 * @param {(v: number) => number} y @param {Frame} frame */
function grid(axis, ticks, x, y, frame) {
  const group = s("g", { class: "grid" });
  const base = frame.zero ?? frame.bottom;
  for (const power of ticks.powers) {
    group.append(s("path", { d: `M${frame.left} ${y(power)}H${frame.right}` }));
    group.append(s("text", { x: frame.left - 8, y: y(power) + 4, "text-anchor": "end" }, powerOfTen(power)));
  }
  if (frame.zero) {
    group.append(s("path", { d: `M${frame.left} ${frame.zero}H${frame.right}`, class: "zero" }));
    group.append(s("text", { x: frame.left - 8, y: frame.zero + 4, "text-anchor": "end" }, "0"));
  }
  let free = -Infinity;
  for (const size of ticks.sizes) {
    group.append(s("path", { d: `M${x(size)} ${frame.top}V${base}` }));
    const text = axis.tick(size);
    if (x(size) - text.length * 3.2 < free || x(size) + text.length * 3 > state.width) continue;
    free = x(size) + text.length * 3.2 + 8;
    group.append(s("text", { x: x(size), y: base + 16, "text-anchor": "middle" }, text));
  }
  group.append(
    s("text", { x: frame.right, y: frame.height - 6, "text-anchor": "end", class: "axis-name" }, `${axis.name} →`),
    s("text", { x: 10, y: frame.height - 6, class: "axis-name" }, "↑ KL, nats/token"),
  );
  return group;
}

/** The line that a search was to stay below. @param {(v: number) => number} y @param {Frame} frame */
function target(y, frame) {
  const most = data.search?.max_kl;
  if (!most) return s("g");
  return s(
    "g",
    { class: "target" },
    s("path", { d: `M${frame.left} ${y(most)}H${frame.right}` }),
    s("text", { x: frame.right - 4, y: y(most) - 5, "text-anchor": "end" }, `asked for: at most ${significant(most)}`),
  );
}

/** @param {readonly Point[]} points @param {Frame} frame */
function steps(points, frame) {
  const below = front(points.map(({ x, y }) => ({ x, y: -y }))); // pixels go down
  if (!below.length) return s("g");
  const line = below.map(({ x, y }, index) => (index ? `H${x}V${-y}` : `M${x} ${frame.top}V${-y}`)).join("");
  return s("path", { class: "front", d: `${line}H${frame.right}` });
}

/** The points with their error bars and names. @param {readonly Point[]} points @param {Frame} frame @param {(v: number) => number} y */
function named(points, frame, y) {
  const inside = { left: frame.left, right: state.width - 4, top: 2, bottom: (frame.zero ?? frame.bottom) + 18 };
  const taken = points.map(({ x, y: at }) => ({ left: x - 8, right: x + 8, top: at - 8, bottom: at + 8 }));
  const most = data.search?.max_kl;
  if (most) taken.push({ left: frame.right - 170, right: frame.right, top: y(most) - 18, bottom: y(most) });
  return points.map((point) => {
    const { row, index } = point;
    const name = row.label.length > LONGEST ? `${row.label.slice(0, 14)}…${row.label.slice(-11)}` : row.label;
    const label = placeLabel(point, name.length * 7, taken, inside);
    taken.push(label.box);
    const group = s(
      "g",
      { class: index === chosenIndex() ? "point chosen" : "point", "data-point": index, tabindex: 0, role: "button" },
      s("title", {}, told(row)),
      errorBar(point, y),
      s("circle", { class: "reach", cx: point.x, cy: point.y, r: 15 }),
      s("circle", { class: "dot", cx: point.x, cy: point.y, r: 5.5 }),
      s("text", { class: "name", x: label.x, y: label.y, "text-anchor": label.anchor }, name),
    );
    group.setAttribute("aria-label", told(row));
    for (const event of ["pointerenter", "focus"]) group.addEventListener(event, () => say(row));
    group.addEventListener("pointerleave", () => say(data.rows[chosenIndex()]));
    group.addEventListener("click", () => choose(index));
    group.addEventListener("keydown", (event) => {
      if (event.key !== "Enter" && event.key !== " ") return;
      event.preventDefault();
      choose(index);
    });
    return group;
  });
}

/** @param {Point} point @param {(v: number) => number} y */
function errorBar({ row, x }, y) {
  const [kl, error] = [row.kl ?? 0, row.kl_stderr ?? 0];
  if (kl <= error || !error) return s("g");
  return s("path", { class: "error-bar", d: `M${x} ${y(kl + error)}V${y(kl - error)}` });
}

/** @param {Row} row */
function say(row) {
  byId("plot-said").replaceChildren(h("strong", {}, row.label), `: ${figures(row)}`);
}

/** @param {Row} row */
function told(row) {
  return `${row.label}: ${figures(row)}`;
}

/** @param {Row} row */
function figures(row) {
  const parts = [`KL ${withError(row.kl, row.kl_stderr, 4)} nats/token`];
  if (row.bits_per_weight !== null) parts.push(`${fixed(row.bits_per_weight, 2)} bits per weight`);
  if (row.disk_bytes !== null) parts.push(`${bytes(row.disk_bytes)} on disk`);
  if (row.memory_bytes !== null) parts.push(`${bytes(row.memory_bytes)} in memory`);
  if (row.perplexity !== null) parts.push(`perplexity ${perplexity(row.perplexity, row.perplexity_stderr)}`);
  return parts.join(", ");
}
