// What one scheme makes of the 32 values: its scales, the values kept over the original ones, the codes, the error.

import { h, s } from "../page_base/dom.js";
import { store } from "./block.js";
import { data } from "./data.js";
import { approximate, exactly, hexadecimal } from "./literal.js";
import { fromNumber, toNumber } from "./rational.js";

/** @typedef {import("./block.js").Scheme} Scheme */
/** The values, which one is chosen, the width of the chart in px and the scale rule of MX. @typedef {{ values: number[], chosen: number, width: number, rule: string }} State */

const STRIP = 84;
const ZOOM = 2; // a strip shows −2 to 2: the ordinary values

/** @param {Scheme} scheme @param {State} state */
export function strip(scheme, state) {
  const follows = data.scale_rules[scheme.name]?.includes(state.rule);
  const rule = follows ? /** @type {import("./block.js").ScaleRule} */ (state.rule) : undefined;
  const stored = store(state.values.map(fromNumber), scheme, rule);
  const kept = stored.blocks.flatMap((block) => block.values.map(toNumber));
  const codes = stored.blocks.flatMap((block) => block.codes);
  const scales = stored.blocks.map(
    (block) => `${approximate(block.scale, 4)} (${hexadecimal(block.scaleCode, scheme.scale)})`,
  );
  const { signal, zeros } = quality(kept, state);
  const own = `${approximate(fromNumber(kept[state.chosen]), 5)}, code ${hexadecimal(codes[state.chosen], scheme.element)}`;
  const list = h("div", { class: "codes" });
  codes.forEach((code, index) => {
    const text = hexadecimal(code, scheme.element).slice(2);
    list.append(
      h(
        "code",
        { class: index === state.chosen ? "chosen" : kept[index] === 0 && state.values[index] !== 0 ? "gone" : "" },
        text,
      ),
    );
  });
  const scaleName = `${scales.length > 1 ? "scales" : "scale"} in ${scheme.scale.name}`;
  return h(
    "article",
    { class: "strip", "data-scheme": scheme.element.name, "aria-label": scheme.name },
    h(
      "header",
      {},
      h("h3", {}, scheme.name),
      h("span", { class: "measure" }, signal),
      h("span", { class: zeros ? "measure bad" : "measure" }, `${zeros} became 0`),
    ),
    picture(
      stored.blocks.map((block) => toNumber(block.scale)),
      kept,
      scheme,
      state,
    ),
    h(
      "p",
      { class: "note" },
      `${scaleName}: ${scales.join(", ")}`,
      scheme.tensorScale
        ? `; of the tensor, in ${scheme.tensorScale.name}: ${exactly(stored.tensor).split(" = ")[0]}`
        : "",
      `. The chosen value: ${own}.`,
    ),
    list,
  );
}

/** Signal to noise of the values but the chosen one, and how many became zero. @param {number[]} kept @param {State} state */
function quality(kept, state) {
  let [power, noise, zeros] = [0, 0, 0];
  state.values.forEach((value, index) => {
    if (index === state.chosen) return;
    power += value * value;
    noise += (kept[index] - value) ** 2;
    zeros += Number(kept[index] === 0 && value !== 0);
  });
  const signal = noise === 0 ? "exact" : `the other 31: ${(10 * Math.log10(power / noise)).toFixed(1)} dB SQNR`;
  return { signal, zeros };
}

/** @param {number[]} scales @param {number[]} kept @param {Scheme} scheme @param {State} state */
function picture(scales, kept, scheme, state) {
  const width = state.width;
  const [step, middle] = [width / state.values.length, STRIP / 2];
  const y = (/** @type {number} */ value) => middle - (Math.min(Math.max(value, -ZOOM), ZOOM) / ZOOM) * (middle - 4);
  const svg = s("svg", { width, height: STRIP, "aria-hidden": "true" });
  scales.forEach((scale, block) => {
    svg.append(levels(scale, scheme, block * scheme.size * step, scheme.size * step, y));
  });
  svg.append(s("path", { class: "axis", d: `M0 ${middle}H${width}` }));
  kept.forEach((value, index) => {
    const original = state.values[index];
    const x = index * step + step * 0.18;
    const bar = (/** @type {number} */ of) => ({
      x,
      y: Math.min(y(of), middle),
      width: step * 0.64,
      height: Math.abs(y(of) - middle),
    });
    svg.append(s("rect", { class: "original", ...bar(original) }));
    svg.append(s("rect", { class: index === state.chosen ? "kept chosen" : "kept", ...bar(value) }));
    const lost = Math.abs(y(original) - y(value));
    if (lost > 0.5)
      svg.append(
        s("rect", { class: "error", x, y: Math.min(y(original), y(value)), width: step * 0.64, height: lost }),
      );
  });
  return svg;
}

/** The values that this scale can give, as faint lines where they are apart. @param {number} scale @param {Scheme} scheme
 * @param {number} left @param {number} width @param {(value: number) => number} y */
function levels(scale, scheme, left, width, y) {
  let lines = "";
  let last = Number.NaN;
  const most = Number(scheme.element.maxCode);
  for (let code = 0; code <= most; code++) {
    const value = toNumber(scheme.element.magnitude(BigInt(code))) * scale;
    if (value > ZOOM || Math.abs(y(value) - last) < 2.5) continue;
    last = y(value);
    lines += `M${left} ${last.toFixed(1)}h${width}M${left} ${y(-value).toFixed(1)}h${width}`;
  }
  return s("path", { class: "levels", d: lines || "M0 0" });
}
