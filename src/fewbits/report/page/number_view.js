// 1. A number in every format: the text that is typed, the rules, and a card for each format.

import { byId, h, select } from "../page_base/dom.js";
import { card } from "./card_view.js";
import { finite } from "./codec.js";
import { data, named, scalars } from "./data.js";
import { exactly, parse } from "./literal.js";

/** @typedef {import("./format.js").Format} Format */
/** @typedef {import("./codec.js").Rounding} Rounding */
/** @typedef {import("./literal.js").Read} Read */

const FIRST = ["fp32", "tf32", "fp16", "bf16", "e4m3fn", "e5m2", "e2m1fn", "int8"];
const EXAMPLES = ["0.1", "1/3", "3.14159", "1000", "65520", "1e-7", "-0x1.8p-3", "inf", "bf16:0x3F81"];
const ROUNDING_TEXT = new Map([
  ["nearest_even", "nearest, ties to even"],
  ["nearest_away", "nearest, ties away from zero"],
  ["toward_zero", "toward zero"],
  ["up", "up, toward +Inf"],
  ["down", "down, toward −Inf"],
  ["stochastic", "stochastic"],
]);

const state = {
  formats: FIRST.map(named),
  text: "0.1",
  /** @type {Read} */
  read: { value: 0 },
  /** @type {Rounding} */
  rounding: "nearest_even",
  overflow: "default",
  random: 0n,
};

/** Build the controls and the cards. */
export function start() {
  const field = byId("number");
  field.addEventListener("input", () => take(/** @type {HTMLInputElement} */ (field).value));
  for (const example of EXAMPLES) {
    byId("examples").append(h("button", { type: "button", class: "chip", onclick: () => show(example) }, example));
  }
  const roundings = data.roundings.map((name) => /** @type {const} */ ([name, ROUNDING_TEXT.get(name) ?? name]));
  byId("rules").append(
    select("Rounding", roundings, state.rounding, (value) => {
      state.rounding = /** @type {Rounding} */ (value);
      draw();
    }),
    select("Beyond the range", overflows(), state.overflow, (value) => {
      state.overflow = value;
      draw();
    }),
    h("button", { type: "button", id: "again", class: "quiet", hidden: true, onclick: draw }, "Draw again"),
  );
  const names = byId("format-names");
  for (const fmt of scalars) names.append(h("option", { value: fmt.name }, fmt.row.use));
  byId("add-format").addEventListener("submit", (event) => {
    event.preventDefault();
    addFormat();
  });
  show(state.text);
}

/** @returns {[string, string][]} */
function overflows() {
  const plain = data.overflows.map((name) => /** @type {[string, string]} */ ([name, OVERFLOW_TEXT.get(name) ?? name]));
  const dialects = data.dialects.map((one) => /** @type {[string, string]} */ ([one.name, `as ${one.what}`]));
  return [["default", "fewbits: Inf if the format has it"], ...plain, ...dialects];
}

const OVERFLOW_TEXT = new Map([
  ["saturate", "saturate: the largest number"],
  ["ieee", "ieee: Inf, else NaN"],
]);

/** Put a number into the field. @param {string} text */
function show(text) {
  /** @type {HTMLInputElement} */ (byId("number")).value = text;
  take(text);
}

/** Read what was typed; what is no number leaves the cards as they are. @param {string} text */
function take(text) {
  const said = byId("number-error");
  try {
    state.read = parse(text, state.formats, named);
    state.text = text;
    said.textContent = "";
    byId("number").removeAttribute("aria-invalid");
    draw();
  } catch (error) {
    said.textContent = /** @type {Error} */ (error).message;
    byId("number").setAttribute("aria-invalid", "true");
  }
}

function draw() {
  const { value, format } = state.read;
  byId("reading").textContent = format
    ? `a code of ${format.name}: ${exactly(value)}`
    : finite(value)
      ? ""
      : "not finite";
  byId("again").hidden = state.rounding !== "stochastic";
  state.random = BigInt(Math.floor(Math.random() * 2 ** 32));
  const dialect = data.dialects.find((one) => one.name === state.overflow);
  byId("dialect").textContent = dialect ? `${dialect.what}. Known from: ${dialect.seen}.` : "";
  const focus = focused();
  byId("cards").replaceChildren(
    ...state.formats.map((fmt) =>
      card(fmt, { ...state, overflow: rule(fmt), note: dialect?.notes[fmt.name] ?? "" }, { flip, remove }),
    ),
  );
  if (focus) /** @type {HTMLElement | null} */ (document.querySelector(focus))?.focus();
}

/** Where the focus is among the bits, so that it stays there when the cards are drawn anew. @returns {string | null} */
function focused() {
  const bit = /** @type {HTMLElement | null} */ (document.activeElement)?.closest(".bit");
  const of = bit?.closest(".card")?.getAttribute("data-format");
  return bit && of ? `.card[data-format="${of}"] .bit[data-bit="${bit.getAttribute("data-bit")}"]` : null;
}

/** The overflow rule of a format; where it has neither Inf nor NaN it saturates. @param {Format} fmt @returns {"saturate" | "ieee"} */
function rule(fmt) {
  if (!fmt.hasInf && !fmt.hasNan) return "saturate";
  const dialect = data.dialects.find((one) => one.name === state.overflow);
  if (dialect) return dialect.formats[fmt.name] ?? dialect.overflow;
  if (state.overflow === "default") return fmt.hasInf ? "ieee" : "saturate";
  return /** @type {"saturate" | "ieee"} */ (state.overflow);
}

/** A bit was clicked, or a code stepped: the number is now that of the code. @param {Format} fmt @param {bigint} code */
function flip(fmt, code) {
  show(
    `${fmt.name}:0x${code
      .toString(16)
      .toUpperCase()
      .padStart(Math.ceil(fmt.bits / 4), "0")}`,
  );
}

/** @param {Format} fmt */
function remove(fmt) {
  state.formats = state.formats.filter((other) => other !== fmt);
  draw();
}

function addFormat() {
  const field = /** @type {HTMLInputElement} */ (byId("format-name"));
  const said = byId("format-error");
  try {
    const fmt = named(field.value);
    if (fmt.row.block)
      throw new Error(`${fmt.name} shares a scale among ${fmt.row.block.size} numbers: see Blocks below`);
    state.formats = [...state.formats.filter((other) => other.name !== fmt.name), fmt];
    [field.value, said.textContent] = ["", ""];
    draw();
    byId("cards").lastElementChild?.scrollIntoView({ block: "nearest" });
  } catch (error) {
    said.textContent = /** @type {Error} */ (error).message;
  }
}
