// The text, a window at a time, each token coloured by what was measured there.

import { byId, h, select } from "../page_base/dom.js";
import { chooser, chosen, onChoice } from "./choice.js";
import { data } from "./data.js";
import { significant } from "./figures.js";
import { scale } from "./heat_map.js";
import { tell } from "./token_view.js";
import { measured, quoted, scaleOf, visible } from "./tokens.js";

/** @typedef {import("./tokens.js").Measure} Measure */

const reference = data.reference === null ? null : data.rows[data.reference];
/** @type {[Measure, string][]} */
const MEASURES = [
  ["kl", "KL to the reference"],
  ["difference", "loss, more or less than the reference’s"],
  ["loss", "loss"],
];
const DARKEST = 52; // per cent of colour under a token, so that it can still be read
const scales = new Map(MEASURES.map(([measure]) => [measure, scaleOf(measure, data, reference)]));
const usable = MEASURES.filter(([measure]) => scales.get(measure)?.some);

/** @type {{ by: Measure, window: number, token: number | null }} */
const state = { by: "kl", window: 0, token: null };
/** @type {HTMLSelectElement | null} */
let windows = null;

/** Show the first window, if there are tokens and figures. */
export function start() {
  if (!usable.length) return false;
  state.by = usable[0][0];
  const controls = byId("text-controls");
  controls.append(chooser((row) => row.losses.length > 0 || row.kls.length > 0));
  controls.append(
    select("Colour by", usable, state.by, (value) => {
      state.by = /** @type {Measure} */ (value);
      colour();
    }),
  );
  if (data.tokens.length > 1) controls.append(windowChoice());
  controls.append(h("button", { type: "button", class: "chip", id: "highest", onclick: highest }, "Go to the highest"));
  if (data.tokens.length < data.windows) {
    controls.append(h("p", { class: "note" }, `The first ${data.tokens.length} of ${data.windows} windows are here.`));
  }
  const box = byId("tokens");
  box.addEventListener("click", (event) => {
    const token = /** @type {Element} */ (event.target).closest("[data-token]");
    if (token) go(Number(token.getAttribute("data-token")));
  });
  box.addEventListener("keydown", keys);
  onChoice(() => {
    colour();
    told();
  });
  write();
  return true;
}

function windowChoice() {
  /** @type {[string, string][]} */
  const options = data.tokens.map((_, index) => [String(index), `${index + 1} of ${data.windows}`]);
  const field = select("Window", options, "0", (value) => {
    Object.assign(state, { window: Number(value), token: null });
    write();
  });
  windows = field.querySelector("select");
  return field;
}

/** Whether a window is here. @param {number} window */
export const has = (window) => usable.length > 0 && window < data.tokens.length;

/** Go to a token of any window, and to the text. @param {number} window @param {number} token */
export function show(window, token) {
  if (window !== state.window) {
    state.window = window;
    if (windows) windows.value = String(window);
    write();
  }
  go(Math.min(token, data.tokens[window].length - 1));
  byId("text").scrollIntoView();
}

/** Write the tokens of the window. */
function write() {
  const spans = data.tokens[state.window].map((token, index) => {
    const label = `${quoted(token)}, token ${index + 1}`;
    return h(
      "span",
      { "data-token": index, role: "button", tabindex: index ? -1 : 0, "aria-label": label },
      visible(token),
    );
  });
  byId("tokens").replaceChildren(...spans);
  byId("tokens").scrollTop = 0;
  colour();
  told();
}

/** Colour them. */
function colour() {
  const of = scales.get(state.by);
  const row = chosen();
  for (const span of /** @type {NodeListOf<HTMLElement>} */ (byId("tokens").querySelectorAll("[data-token]"))) {
    const value = measured(state.by, row, reference, state.window, Number(span.dataset.token));
    const strength = value === null || !of ? 0 : of.strength(value);
    const part = Math.round(DARKEST * Math.abs(strength));
    span.className = part < 2 ? "" : strength < 0 ? "better" : "worse";
    span.style.setProperty("--strength", `${part}%`);
  }
  legend();
}

function legend() {
  const most = scales.get(state.by)?.most ?? 1;
  /** @type {Record<Measure, [number, string][]>} */
  const marks = {
    kl: [
      [0, `≤ ${significant(most / 1000, 2)}`],
      [1 / 3, significant(most / 100, 2)],
      [2 / 3, significant(most / 10, 2)],
      [1, `${significant(most, 2)} nats`],
    ],
    loss: [
      [0, "0, foreseen"],
      [1, `${significant(most, 2)} nats, a surprise`],
    ],
    difference: [
      [0, "as the reference"],
      [1, `${significant(most, 2)} nats worse; green is better`],
    ],
  };
  byId("text-legend").replaceChildren(scale("heat-text", marks[state.by], DARKEST));
}

/** @param {number} token */
function go(token) {
  const box = byId("tokens");
  const old = box.querySelector("[aria-pressed]");
  old?.removeAttribute("aria-pressed");
  for (const span of box.querySelectorAll("[tabindex='0']")) span.setAttribute("tabindex", "-1");
  const span = /** @type {HTMLElement} */ (box.children[token]);
  span.setAttribute("aria-pressed", "true");
  span.tabIndex = 0;
  span.focus({ preventScroll: true });
  const [top, bottom] = [span.offsetTop - box.offsetTop, span.offsetTop - box.offsetTop + span.offsetHeight];
  if (top < box.scrollTop || bottom > box.scrollTop + box.clientHeight) box.scrollTop = top - box.clientHeight / 2;
  state.token = token;
  told();
}

function told() {
  tell(byId("token-told"), chosen(), state.window, state.token);
}

/** @param {KeyboardEvent} event */
function keys(event) {
  const span = /** @type {HTMLElement} */ (event.target);
  const at = Number(span.dataset.token);
  const last = data.tokens[state.window].length - 1;
  /** @type {Record<string, () => number>} */
  const next = {
    ArrowLeft: () => at - 1,
    ArrowRight: () => at + 1,
    ArrowUp: () => inLine(span, -1),
    ArrowDown: () => inLine(span, 1),
    Home: () => 0,
    End: () => last,
    Enter: () => at,
    " ": () => at,
  };
  if (!(event.key in next)) return;
  event.preventDefault();
  go(Math.min(Math.max(next[event.key](), 0), last));
}

/** The token above or below, nearest to the column of this one. @param {HTMLElement} from @param {1 | -1} way */
function inLine(from, way) {
  const spans = /** @type {HTMLElement[]} */ ([...byId("tokens").children]);
  let at = spans.indexOf(from);
  while (spans[at] && spans[at].offsetTop === from.offsetTop) at += way;
  const top = spans[at]?.offsetTop;
  let best = at;
  for (; spans[at]?.offsetTop === top && spans[at]; at += way) {
    const apart = (/** @type {number} */ index) => Math.abs(spans[index].offsetLeft - from.offsetLeft);
    if (apart(at) < apart(best)) best = at;
  }
  return best;
}

/** Go to the token of the window with the highest value. */
function highest() {
  const values = data.tokens[state.window].map(
    (_, token) => measured(state.by, chosen(), reference, state.window, token) ?? -Infinity,
  );
  go(values.indexOf(Math.max(...values)));
}
