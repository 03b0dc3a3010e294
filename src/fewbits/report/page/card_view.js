// One number in one format: its bits as buttons, what the format keeps of it, and where it lies between its neighbours.

import { h, s } from "../page_base/dom.js";
import { decode, encode, finite, fraction, neighbours, ulp } from "./codec.js";
import { approximate, exactly, hexadecimal, percent } from "./literal.js";
import { abs, div, sub, toNumber } from "./rational.js";

/** @typedef {import("./format.js").Format} Format */
/** @typedef {import("./codec.js").Exact} Exact */
/** @typedef {import("./codec.js").Rounding} Rounding */
/** @typedef {import("./rational.js").Rational} Rational */
/** @typedef {{ read: import("./literal.js").Read, rounding: Rounding, overflow: "saturate" | "ieee", random: bigint, note: string }} How */
/** @typedef {{ flip: (fmt: Format, code: bigint) => void, remove: (fmt: Format) => void }} Actions */

const FIELDS = ["sign", "exponent", "mantissa"];

/** The card of one format. @param {Format} fmt @param {How} how @param {Actions} actions */
export function card(fmt, how, actions) {
  const { value } = how.read;
  const own = how.read.format?.name === fmt.name && how.read.code !== undefined; // a pattern keeps its bits, NaN too
  const code = own ? /** @type {bigint} */ (how.read.code) : encode(value, fmt, how.rounding, how.overflow, how.random);
  const kept = decode(code, fmt);
  const remove = () => actions.remove(fmt);
  return h(
    "article",
    { class: "card", "data-format": fmt.name, "aria-label": fmt.name },
    h(
      "header",
      {},
      h("h3", {}, fmt.name),
      h("span", { class: "use" }, fmt.row.use),
      h("code", { class: "hex" }, hexadecimal(code, fmt)),
      h("button", { type: "button", class: "remove", "aria-label": `Remove ${fmt.name}`, onclick: remove }, "×"),
    ),
    bits(code, fmt, (other) => actions.flip(fmt, other)),
    facts(value, kept, fmt),
    how.note ? h("p", { class: "note" }, `This dialect: ${how.note}`) : null,
  );
}

/** The bits as buttons, one tab stop for all: arrow keys go along them, up and down step the code.
 * @param {bigint} code @param {Format} fmt @param {(code: bigint) => void} change */
function bits(code, fmt, change) {
  const row = h("div", { class: "bits", role: "group", "aria-label": `Bits of ${fmt.name}` });
  let place = fmt.bits;
  fmt.fields.forEach((width, field) => {
    if (!width) return;
    const label = fmt.row.kind === "codebook" ? "index" : FIELDS[field];
    const group = h("div", { class: `bit-field ${FIELDS[field]}` }, h("span", { class: "legend" }, label));
    const cells = h("div", { class: "cells" });
    for (let at = 0; at < width; at++) {
      place -= 1;
      const bit = BigInt(place);
      const on = (code >> bit) & 1n;
      const attributes = { type: "button", class: "bit", "data-bit": place, "aria-pressed": String(on === 1n) };
      const name = `${fmt.name} ${label} bit ${place}`;
      const flip = () => change(code ^ (1n << bit));
      const tabindex = place === fmt.bits - 1 ? 0 : -1;
      cells.append(h("button", { ...attributes, "aria-label": name, tabindex, onclick: flip }, String(on)));
    }
    group.append(cells);
    row.append(group);
  });
  row.addEventListener("focusin", (event) => {
    for (const button of row.querySelectorAll("button")) button.tabIndex = button === event.target ? 0 : -1;
  });
  row.addEventListener("keydown", (event) => move(/** @type {KeyboardEvent} */ (event), row, code, fmt, change));
  return row;
}

/** @param {KeyboardEvent} event @param {HTMLElement} row @param {bigint} code @param {Format} fmt
 * @param {(code: bigint) => void} change */
function move(event, row, code, fmt, change) {
  const buttons = /** @type {HTMLElement[]} */ ([...row.querySelectorAll(".bit")]);
  const at = buttons.indexOf(/** @type {HTMLElement} */ (event.target));
  /** @type {Record<string, number>} */
  const places = { ArrowLeft: at - 1, ArrowRight: at + 1, Home: 0, End: buttons.length - 1 };
  const step = { ArrowUp: 1n, ArrowDown: -1n }[event.key];
  if (event.key in places) {
    buttons[Math.min(Math.max(places[event.key], 0), buttons.length - 1)].focus();
  } else if (step !== undefined) {
    const next = code + step;
    if (next >= 0n && next < 1n << BigInt(fmt.bits)) change(next);
  } else return;
  event.preventDefault();
}

/** @param {Exact} value @param {Exact} kept @param {Format} fmt */
function facts(value, kept, fmt) {
  const [below, above] = neighbours(value, fmt);
  const list = h("dl", { class: "facts" });
  /** @param {string} name @param {string} text @param {string} [kind] */
  const fact = (name, text, kind = "") => list.append(h("div", { class: kind }, h("dt", {}, name), h("dd", {}, text)));
  fact("keeps", exactly(kept), "kept");
  const { absolute, relative, verdict } = error(value, kept, fmt);
  fact("absolute error", absolute);
  fact("relative error", relative);
  fact("ULP here", finite(value) ? approximate(ulp(value, fmt), 4) : "–");
  fact("next below", below ? approximate(below, 10) : "none");
  fact("next above", above ? approximate(above, 10) : "none");
  return h(
    "div",
    { class: "told" },
    list,
    verdict ? h("p", { class: "verdict" }, verdict) : gap(value, kept, below, above),
  );
}

/** The error in words. @param {Exact} value @param {Exact} kept @param {Format} fmt */
function error(value, kept, fmt) {
  const none = { absolute: "–", relative: "–" };
  if (!finite(value)) {
    const same = Object.is(value, kept);
    return { ...none, verdict: same ? "" : `${fmt.name} holds no ${Number.isNaN(value) ? "NaN" : "Inf"}` };
  }
  if (!finite(kept)) {
    const negative = !fmt.row.signed && fraction(value).n < 0n;
    return {
      ...none,
      verdict: negative
        ? `${fmt.name} holds no negative numbers`
        : `Overflow: beyond ${approximate(fmt.max)}, the largest`,
    };
  }
  const difference = sub(fraction(kept), fraction(value));
  if (difference.n === 0n) return { absolute: "0, exact", relative: "0", verdict: "" };
  const absolute = approximate(difference, 4);
  const relative = fraction(value).n === 0n ? "–" : percent(difference, fraction(value));
  const lost = fraction(kept).n === 0n && fraction(value).n !== 0n;
  return {
    absolute,
    relative,
    verdict: lost ? "Underflow: it becomes 0" : beyond(value, fmt) ? "Saturated at the end of the range" : "",
  };
}

/** @param {Exact} value @param {Format} fmt */
function beyond(value, fmt) {
  const [below, above] = neighbours(value, fmt);
  return below === null || above === null;
}

/** A line between the two neighbours: the typed number as a dot, the kept one as a bar.
 * @param {Exact} value @param {Exact} kept @param {Rational | null} below @param {Rational | null} above */
function gap(value, kept, below, above) {
  if (!below || !above || !finite(value) || !finite(kept)) return null;
  const width = sub(above, below);
  const at = (/** @type {Exact} */ number) => 6 + 188 * toNumber(div(abs(sub(fraction(number), below)), width));
  const label = "Where the number lies between its neighbours";
  return s(
    "svg",
    { class: "gap", viewBox: "0 0 200 22", role: "img", "aria-label": label, preserveAspectRatio: "none" },
    s("path", { class: "axis", d: "M6 13H194M6 8v10M194 8v10" }),
    s("path", { class: "mark-kept", d: `M${at(kept)} 5v16` }),
    s("circle", { class: "mark-value", cx: at(value), cy: 13, r: 3.2 }),
  );
}
