// 5. What fits: a bar for each precision against the memory that there is.

import { byId, h, select, slider } from "../page_base/dom.js";
import { data, named } from "./data.js";
import { bitsPerWeight, cacheBytes, weightBytes } from "./memory.js";

const GIB = 2 ** 30;
const MEMORIES = [4, 6, 8, 10, 12, 16, 24, 32, 40, 48, 64, 80, 96, 141, 192, 288, 640, 1128];

const state = { ...shape(3), memory: 6, context: 13, batch: 0, cache: "bf16" };

/** @param {number} index of the model */
function shape(index) {
  const model = data.models[index];
  const embedding = model.vocabulary * model.hidden * (model.tied ? 1 : 2);
  return { parameters: model.parameters, embedding, layers: model.layers, kvWidth: model.kv_heads * model.head_dim };
}

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
    const parameters = billions.valueAsNumber * 1e9;
    Object.assign(state, { parameters, embedding: Math.min(state.embedding, parameters) });
    draw();
  });
  const models = data.models.map((model, index) => /** @type {[string, string]} */ ([String(index), model.name]));
  const tokens = (/** @type {number} */ power) => (2 ** power).toLocaleString("en");
  byId("memory-controls").append(
    select("Model", models, "3", (value) => {
      Object.assign(state, shape(Number(value)));
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
        ["bf16", "16 bits"],
        ["e4m3fn", "8 bits"],
        ["int4", "4 bits"],
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
  const cache = cacheBytes(state, 2 ** (state.context + state.batch), named(state.cache).bits);
  const running = data.precisions.map((stored) => {
    const weights = named(stored.weights);
    const note = `${Number(bitsPerWeight(stored, weights).toFixed(3))} bits per weight`;
    return {
      name: stored.name,
      note,
      parts: /** @type {[string, number][]} */ ([
        ["weights", weightBytes(state, stored, weights)],
        ["keys and values", cache],
      ]),
    };
  });
  const training = data.trainings.map(({ name, parts }) => {
    const each = parts.reduce((sum, [, bytes]) => sum + bytes, 0);
    return {
      name,
      note: `${Number(each.toFixed(2))} bytes per parameter`,
      parts: parts.map(([what, bytes]) => /** @type {[string, number]} */ ([what, bytes * state.parameters])),
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
