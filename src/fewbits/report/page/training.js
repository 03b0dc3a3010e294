// What goes wrong in training, as arithmetic: sums that stop, updates that are lost, gradients that leave the range.

import { decode, encode, fraction } from "./codec.js";
import { add, compare, rational, sub, toNumber, twoTo } from "./rational.js";

/** @typedef {import("./format.js").Format} Format */
/** @typedef {import("./codec.js").Rounding} Rounding */
/** @typedef {import("./rational.js").Rational} Rational */

const random = () => BigInt(Math.floor(Math.random() * 2 ** 32));

/** @param {Rational} value @param {Format} fmt @param {Rounding} [rounding] */
function rounded(value, fmt, rounding = "nearest_even") {
  return fraction(decode(encode(value, fmt, rounding, "saturate", rounding === "stochastic" ? random() : 0n), fmt));
}

/**
 * Ones, added one by one with each sum rounded: the sums after 1, 2, … additions.
 * @param {Format} fmt @param {number} count @param {Rounding} rounding
 * @returns {{ sums: number[], stops: number | null }} where the sum is the same for ever, if it is
 */
export function sumOfOnes(fmt, count, rounding) {
  const one = rational(1);
  let sum = rational(0);
  const sums = [];
  for (let at = 0; at < count; at++) {
    const next = rounded(add(sum, one), fmt, rounding);
    if (rounding !== "stochastic" && compare(next, sum) === 0) {
      return { sums: [...sums, ...Array(count - at).fill(toNumber(sum))], stops: toNumber(sum) };
    }
    sum = next;
    sums.push(toNumber(sum));
  }
  return { sums, stops: null };
}

/**
 * A weight of 1 that is lowered by the same update at each step: in exact numbers, kept in a format, and kept in fp32
 * with a copy in the format.
 * @param {Format} fmt @param {Format} master @param {number} update a power of two: the update is 2^update
 * @param {number} steps
 */
export function updates(fmt, master, update, steps) {
  const change = twoTo(update);
  let [exact, alone, kept] = [rational(1), rational(1), rational(1)];
  /** @type {{ exact: number[], alone: number[], copy: number[] }} */
  const lines = { exact: [1], alone: [1], copy: [1] };
  for (let step = 0; step < steps; step++) {
    exact = sub(exact, change);
    alone = rounded(sub(alone, change), fmt);
    kept = rounded(sub(kept, change), master);
    lines.exact.push(toNumber(exact));
    lines.alone.push(toNumber(alone));
    lines.copy.push(toNumber(rounded(kept, fmt)));
  }
  return lines;
}

/** Counts of values with 2^e ≤ magnitude < 2^(e+1). @typedef {Map<number, number>} Counts */

/** Where a format's rounding changes its ways. @param {Format} fmt */
export function zones(fmt) {
  const smallest = toNumber(fmt.magnitude(1n));
  const last = toNumber(sub(fmt.max, fmt.magnitude(fmt.maxCode - 1n)));
  return { zeroTo: smallest / 2, normalFrom: 2 ** fmt.emin - smallest / 2, overFrom: toNumber(fmt.max) + last / 2 };
}

/**
 * What a format makes of gradients times a loss scale, as shares of all that are not zero. A value counts as spread
 * evenly between its powers of two, as `fewbits preflight` does within its finer bins.
 * @param {Counts} counts @param {Format} fmt @param {number} scale as a power of two
 */
export function judge(counts, fmt, scale) {
  const { zeroTo, normalFrom, overFrom } = zones(fmt);
  const share = { zero: 0, subnormal: 0, normal: 0, over: 0, lost: 0 };
  let [total, magnitude, lost] = [0, 0, 0];
  for (const [exponent, count] of counts) {
    const edges = [zeroTo, normalFrom, overFrom].map((edge) => part(edge, exponent + scale));
    share.zero += count * edges[0];
    share.subnormal += count * (edges[1] - edges[0]);
    share.normal += count * (edges[2] - edges[1]);
    share.over += count * (1 - edges[2]);
    const size = 1.5 * 2 ** (exponent + scale);
    magnitude += count * size;
    lost += count * (edges[0] * size + ((edges[1] - edges[0]) * zeroTo) / 2);
    total += count;
  }
  for (const key of /** @type {const} */ (["zero", "subnormal", "normal", "over"])) share[key] /= total || 1;
  share.lost = magnitude ? lost / magnitude : 0;
  return share;
}

/** Which part of the values between 2^e and 2^(e+1) is below an edge. @param {number} edge @param {number} exponent */
function part(edge, exponent) {
  return Math.min(Math.max(edge / 2 ** exponent - 1, 0), 1);
}

/**
 * The loss scales, as powers of two, that suit every histogram: nothing overflows and little enough is lost, no more
 * than rounding may change of any normal number. Null if there are none.
 * @param {readonly { counts: Counts, largest?: number }[]} histograms @param {Format} fmt
 * @param {number} most the largest to look at
 * @returns {[number, number] | null}
 */
export function scaleWindow(histograms, fmt, most) {
  const tolerance = toNumber(fmt.eps) / 2;
  const limit = toNumber(fmt.max);
  const works = [];
  for (let scale = 0; scale <= most; scale++) {
    const suits = histograms.every(({ counts, largest }) => {
      const { over, lost } = judge(counts, fmt, scale);
      const inside = largest === undefined ? over === 0 : largest * 2 ** scale <= limit;
      return inside && lost <= tolerance;
    });
    if (suits) works.push(scale);
  }
  return works.length ? [works[0], works[works.length - 1]] : null;
}
