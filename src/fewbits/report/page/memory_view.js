// 5. What fits: a bar for each precision against the memory that there is.

import { byId, h, select, slider } from "../page_base/dom.js";
import { data } from "./data.js";
import { cacheBytes, weightBytes } from "./memory.js";

const GIB = 2 ** 30;
const MEMORIES = [4, 6, 8, 10, 12, 16, 24, 32, 40, 48, 64, 80, 96, 141, 192, 288, 640, 1128];

const FIRST = 3;

const state = {
  model: data.models[FIRST],
  parameters: data.models[FIRST].parameters,
  memory: 6,
  context: 13,
  batch: 0,
  cache: "computed",
};

/** Build the controls and the bars. */
export function start() {
  const billions = h("input", {
    type: "number",
    min: 0.001,
    step: "any",
    id: "parameters",
    "aria-label": "Billions of parameters",
  });
  billions.value = (state.parameters / 1e9).toFixed(2);
  billions.addEventListener("input", () => {
    if (!(billions.valueAsNumber > 0)) return;
    state.parameters = billions.valueAsNumber * 1e9;
    draw();
  });
  const models = data.models.map((model, index) => /** @type {[string, string]} */ ([String(index), model.name]));
  const tokens = (/** @type {number} */ power) => (2 ** power).toLocaleString("en");
  byId("memory-controls").append(
    select("Model", models, String(FIRST), (value) => {
      state.model = data.models[Number(value)];
      state.parameters = state.model.parameters;
      billions.value = (state.parameters / 1e9).toFixed(2);
      draw();
    }),
    h("label", { class: "field" }, h("span", {}, "Parameters, billions"), billions),
    slider(
      "Memory",
      { min: 0, max: MEMORIES.length - 1, value: state.memory, id: "memory" },
      (at) => `${MEMORIES[at]} GiB`,
      (at) => {
        state.memory = at;
        draw();
      },
    ),
    slider(
      "Context",
      { min: 9, max: 20, value: state.context },
      (at) => `${tokens(at)} tokens`,
      (at) => {
        state.context = at;
        draw();
      },
    ),
    slider("Sequences at once", { min: 0, max: 8, value: state.batch }, tokens, (at) => {
      state.batch = at;
      draw();
    }),
    select(
      "Keys and values in",
      [
        ["computed", "the dtype of the layers"],
        ["int8", "int8, with scales"],
      ],
      state.cache,
      (value) => {
        state.cache = value;
        draw();
      },
    ),
  );
  draw();
}

function draw() {
  const { model } = state;
  const tokens = 2 ** (state.context + state.batch);
  const times = state.parameters / model.parameters;
  const running = data.precisions.map(({ name }) => ({
    name,
    note: `${Number(model.bits[name].toFixed(3))} bits per weight`,
    parts: /** @type {[string, number][]} */ ([
      ["weights", weightBytes(model, name, times)],
      ["keys and values", cacheBytes(model, name, state.cache === "int8", tokens)],
    ]),
  }));
  const training = data.trainings.map(({ name, parts }) => {
    const each = parts.reduce((sum, [, bytes]) => sum + bytes, 0);
    return {
      name,
      note: `${Number(each.toFixed(2))} bytes per parameter`,
      parts: parts
        .filter(([, bytes]) => bytes > 0)
        .map(([what, bytes]) => /** @type {[string, number]} */ ([what, bytes * state.parameters])),
    };
  });
  byId("memory-running").replaceChildren(...bars(running));
  byId("memory-training").replaceChildren(...bars(training));
}

/** @param {{ name: string, note: string, parts: [string, number][] }[]} rows */
function bars(rows) {
  const memory = MEMORIES[state.memory] * GIB;
  const sums = rows.map((row) => row.parts.reduce((sum, [, bytes]) => sum + bytes, 0));
  const longest = Math.max(...sums, memory * 1.02);
  return rows.map((row, index) => {
    const fits = sums[index] <= memory;
    const bar = h("div", { class: "bar-rail" });
    row.parts.forEach(([what, bytes], part) => {
      const piece = h("span", { class: `piece p${part}`, title: `${what}: ${size(bytes)}` });
      piece.style.width = `${(100 * bytes) / longest}%`;
      bar.append(piece);
    });
    const limit = h("span", { class: "limit", title: `${MEMORIES[state.memory]} GiB` });
    limit.style.left = `${(100 * memory) / longest}%`;
    bar.append(limit);
    const verdict = h("span", { class: fits ? "fits" : "fits not" }, fits ? "✓ fits" : "✗ too large");
    const told = row.parts.map(([what, bytes]) => `${what} ${size(bytes)}`).join(" + ");
    return h(
      "li",
      { "data-row": row.name },
      h(
        "div",
        { class: "memory-head" },
        h("strong", {}, row.name),
        h("span", { class: "use" }, row.note),
        h("span", { class: "total" }, size(sums[index])),
        verdict,
      ),
      bar,
      h("p", { class: "note" }, told),
    );
  });
}

/** @param {number} bytes */
function size(bytes) {
  return bytes < GIB
    ? `${(bytes / 2 ** 20).toFixed(0)} MiB`
    : `${(bytes / GIB).toFixed(bytes < 100 * GIB ? 1 : 0)} GiB`;
}
