// 4. What goes wrong in training: a sum of ones, and an update beside a large weight.

import { byId, onWidth, select, slider, toggles } from "../page_base/dom.js";
import { named } from "./data.js";
import { powerOfTwo } from "./literal.js";
import { legend, plot } from "./plot.js";
import { sumOfOnes, updates } from "./training.js";

/** @typedef {import("./codec.js").Rounding} Rounding */

const SUMS = ["e5m2", "e4m3fn", "bf16", "fp16", "fp32"];
const UPDATED = ["bf16", "fp16", "e4m3fn"];

/** Build both charts. */
export function start() {
  startSums();
  startUpdates();
}

function startSums() {
  const state = { on: new Set(["e4m3fn", "bf16", "fp16"]), count: 12, rounding: "nearest_even", width: 0 };
  const chart = byId("sum-chart");
  const draw = () => {
    if (!state.width) return;
    const count = 2 ** state.count;
    const chosen = SUMS.filter((name) => state.on.has(name));
    const sums = chosen.map((name) => ({
      name,
      ...sumOfOnes(named(name), count, /** @type {Rounding} */ (state.rounding)),
    }));
    const exact = { name: "exact", kind: "k-exact", values: [0, count] };
    const lines = sums.map(({ name, sums: values }) => ({ name, kind: `k-${name}`, values: [0, ...values] }));
    const straight = { ...exact, values: Array.from({ length: count + 1 }, (_, at) => at) };
    const ticks = [0, 0.25, 0.5, 0.75, 1].map((part) => part * count);
    const axis = { low: 0, high: count, steps: count, ticks, label: "Sums of ones, by the number of ones added" };
    chart.replaceChildren(plot(state.width, 240, [straight, ...lines], axis));
    byId("sum-legend").replaceChildren(...legend([straight, ...lines]));
    const said = sums.map(({ name, sums: values, stops }) =>
      stops === null ? `${name} reaches ${values[count - 1]}` : `${name} stops at ${stops}`,
    );
    byId("sum-said").textContent = `${count} ones: ${said.join(", ") || "no format is chosen"}.`;
  };
  byId("sum-controls").append(
    toggles("Formats of the sum", SUMS, state.on, draw),
    slider(
      "Ones",
      { min: 3, max: 12, value: state.count, id: "sum-count" },
      (power) => String(2 ** power),
      (power) => {
        state.count = power;
        draw();
      },
    ),
    select(
      "Rounding of the sum",
      [
        ["nearest_even", "nearest, ties to even"],
        ["toward_zero", "toward zero"],
        ["stochastic", "stochastic"],
      ],
      state.rounding,
      (value) => {
        state.rounding = value;
        draw();
      },
    ),
  );
  onWidth(chart, (width) => {
    state.width = width;
    draw();
  });
}

function startUpdates() {
  const state = { format: "bf16", update: -11, width: 0 };
  const steps = 200;
  const chart = byId("update-chart");
  const draw = () => {
    if (!state.width) return;
    const run = updates(named(state.format), named("fp32"), state.update, steps);
    const lines = [
      { name: "exact", kind: "k-exact", values: run.exact },
      { name: `FP32 master, as its ${state.format} copy shows it`, kind: "k-fp16", values: run.copy },
      { name: `${state.format} alone`, kind: "k-bf16", values: run.alone },
    ];
    const low = Math.min(run.exact[steps], run.copy[steps], run.alone[steps]);
    const ticks = [0, 0.5, 1].map((part) => low + part * (1 - low));
    const axis = { low, high: 1, steps, ticks, label: "The weight, step by step" };
    chart.replaceChildren(plot(state.width, 220, lines, axis));
    byId("update-legend").replaceChildren(...legend(lines));
    const still = run.alone[steps] === 1;
    const end = Number(run.alone[steps].toPrecision(5));
    byId("update-said").textContent = still
      ? `After ${steps} updates the ${state.format} weight is still 1: each is less than half a step and rounded away. The FP32 master is at ${Number(run.exact[steps].toPrecision(6))}.`
      : `After ${steps} updates the ${state.format} weight is ${end}; exactly it would be ${Number(run.exact[steps].toPrecision(6))}.`;
  };
  byId("update-controls").append(
    select(
      "Format of the weight",
      UPDATED.map((name) => [name, name]),
      state.format,
      (value) => {
        state.format = value;
        draw();
      },
    ),
    slider(
      "Update",
      { min: -16, max: -3, value: state.update, id: "update-size" },
      (power) => powerOfTwo(power),
      (power) => {
        state.update = power;
        draw();
      },
    ),
  );
  onWidth(chart, (width) => {
    state.width = width;
    draw();
  });
}
