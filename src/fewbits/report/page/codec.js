// Codes to numbers and back in exact arithmetic, for every format alike: the same steps as fewbits.formats.exact, and
// tested against it on every code of every format up to 16 bits.
//
// Finite values are Rationals; what a fraction cannot be, -0, ±Inf and NaN, is a number.

import { abs, compare, div, floor, mul, neg, rational, sub, twoTo, ZERO } from "./rational.js";

/** @typedef {import("./rational.js").Rational} Rational */
/** @typedef {import("./format.js").Format} Format */
/** A Rational, or one of the numbers -0, Infinity, -Infinity, NaN. @typedef {Rational | number} Exact */
/** @typedef {"nearest_even" | "nearest_away" | "toward_zero" | "up" | "down" | "stochastic"} Rounding */

const RANDOM_BITS = 32;
const CODEBOOK_RANDOM_BITS = 24; // as fewbits draws them between the levels of a codebook
const HALF = rational(1, 2);

/** @param {Exact} value */
export function isNegative(value) {
  return typeof value === "number" ? value < 0 || Object.is(value, -0) : value.n < 0n;
}

/** The fraction of a finite number; of -0 it is 0. @param {Exact} value @returns {Rational} */
export function fraction(value) {
  return typeof value === "number" ? ZERO : value;
}

/** @param {Exact} value */
export function finite(value) {
  return typeof value !== "number" || value === 0;
}

/** The number that a code means. @param {bigint} code @param {Format} fmt @returns {Exact} */
export function decode(code, fmt) {
  if (fmt.row.kind === "codebook") return fmt.levels[Number(code)];
  const negative = code >= fmt.signBit;
  const magnitude = negative ? code - fmt.signBit : code;
  if (fmt.twosComplement) return negative ? neg(fmt.magnitude(fmt.signBit - magnitude)) : fmt.magnitude(magnitude);
  if (fmt.isNan(code)) return Number.NaN;
  if (magnitude === fmt.infCode) return negative ? -Infinity : Infinity;
  const value = fmt.magnitude(magnitude);
  if (!negative) return value;
  return value.n ? neg(value) : -0;
}

/**
 * The code that a number becomes. NaN becomes the format's NaN code; numbers beyond the range and Inf follow the rule.
 * @param {Exact} value
 * @param {Format} fmt
 * @param {Rounding} [rounding]
 * @param {"saturate" | "ieee"} [overflow] by default ieee if the format has Inf, else saturate
 * @param {bigint} [random] an integer of 32 bits, for stochastic rounding
 * @returns {bigint}
 */
export function encode(
  value,
  fmt,
  rounding = "nearest_even",
  overflow = fmt.hasInf ? "ieee" : "saturate",
  random = 0n,
) {
  if (Number.isNaN(value)) return fmt.nanCode;
  const negative = typeof value === "number" && value === 0 ? fmt.row.signed && isNegative(value) : isNegative(value);
  const away = rounding === "up" ? !negative : rounding === "down" ? negative : null; // null: the mode is symmetric
  if (fmt.row.kind === "codebook") return nearestLevel(value, fmt, rounding, random);
  const limit = negative ? fmt.leastCode : fmt.maxCode;
  if (!finite(value)) return signed(infinity(fmt, overflow, limit), negative, fmt);
  const magnitude = abs(fraction(value));
  const lower = lastAtMost(magnitude, fmt, limit + 1n);
  let code = lower < 0n ? 0n : lower;
  if (lower >= 0n && lower <= limit && leavesLower(magnitude, lower, fmt, rounding, away, random)) code = lower + 1n;
  if (code > limit) {
    const stops = rounding === "toward_zero" || away === false;
    code = stops || overflow === "saturate" ? limit : infinity(fmt, overflow, limit);
  }
  return signed(code, negative, fmt);
}

/** The gap between the two neighbours of a finite number. @param {Exact} value @param {Format} fmt @returns {Rational} */
export function ulp(value, fmt) {
  const number = fraction(value);
  if (fmt.row.kind === "codebook") {
    const above = fmt.levels.findIndex((level) => compare(level, number) > 0);
    const index = above < 0 ? fmt.levels.length - 1 : Math.max(above, 1);
    return sub(fmt.levels[index], fmt.levels[index - 1]);
  }
  const last = lastAtMost(abs(number), fmt, fmt.maxCode);
  const lower = last < 0n ? 0n : last;
  return sub(fmt.magnitude(lower + 1n), fmt.magnitude(lower));
}

/**
 * The largest finite value strictly below a number, and the smallest strictly above; null where there is none.
 * @param {Exact} value @param {Format} fmt @returns {[Rational | null, Rational | null]}
 */
export function neighbours(value, fmt) {
  if (Number.isNaN(value)) return [null, null];
  const { least, most } = ordinals(fmt);
  const below = firstOrdinal(fmt, (other) => against(other, value) >= 0) - 1n;
  const above = firstOrdinal(fmt, (other) => against(other, value) > 0);
  return [below < least ? null : ordinalValue(below, fmt), above > most ? null : ordinalValue(above, fmt)];
}

/** The finite values are numbered in ascending order: the first and the last number. @param {Format} fmt */
export function ordinals(fmt) {
  if (fmt.row.kind === "codebook") return { least: 0n, most: BigInt(fmt.levels.length) - 1n };
  return { least: fmt.row.signed ? -fmt.leastCode : 0n, most: fmt.maxCode };
}

/** @param {bigint} ordinal @param {Format} fmt @returns {Rational} */
export function ordinalValue(ordinal, fmt) {
  if (fmt.row.kind === "codebook") return fmt.levels[Number(ordinal)];
  return ordinal >= 0n ? fmt.magnitude(ordinal) : neg(fmt.magnitude(-ordinal));
}

/** The first ordinal whose value passes a test that all larger ones pass too; one more than the last if none does.
 * @param {Format} fmt @param {(value: Rational) => boolean} passes */
function firstOrdinal(fmt, passes) {
  const { least, most } = ordinals(fmt);
  let [low, high] = [least - 1n, most + 1n];
  while (high - low > 1n) {
    const middle = (low + high) >> 1n;
    if (passes(ordinalValue(middle, fmt))) high = middle;
    else low = middle;
  }
  return high;
}

/** @param {Rational} level @param {Exact} value not NaN */
function against(level, value) {
  return finite(value) ? compare(level, fraction(value)) : value === Infinity ? -1 : 1;
}

/** The largest magnitude code up to `last` whose value is at most this; -1 if even that of code 0 is larger.
 * @param {Rational} magnitude @param {Format} fmt @param {bigint} last */
function lastAtMost(magnitude, fmt, last) {
  let [low, high] = [-1n, last + 1n];
  while (high - low > 1n) {
    const middle = (low + high) >> 1n;
    if (compare(fmt.magnitude(middle), magnitude) <= 0) low = middle;
    else high = middle;
  }
  return low;
}

/** Whether a magnitude between code `lower` and the next one takes the next one.
 * @param {Rational} magnitude @param {bigint} lower @param {Format} fmt
 * @param {Rounding} rounding @param {boolean | null} away @param {bigint} random */
function leavesLower(magnitude, lower, fmt, rounding, away, random) {
  const low = fmt.magnitude(lower);
  const part = div(sub(magnitude, low), sub(fmt.magnitude(lower + 1n), low)); // in [0, 1)
  if (part.n === 0n) return false;
  // Without mantissa bits the significand is 1, odd, for every code but that of zero.
  const odd = fmt.mantissaBits ? (lower & 1n) === 1n : lower > 0n || !fmt.row.has_subnormals;
  return choosesUpper(part, odd, rounding, away, random, RANDOM_BITS);
}

/** Whether a number this part of the way from the lower magnitude to the upper takes the upper one.
 * @param {Rational} part @param {boolean} odd @param {Rounding} rounding @param {boolean | null} away
 * @param {bigint} random @param {number} bits */
function choosesUpper(part, odd, rounding, away, random, bits) {
  if (away !== null) return away && part.n > 0n;
  if (rounding === "toward_zero") return false;
  // Adding random bits below the last kept bit and truncating: a carry out of them is a step up.
  if (rounding === "stochastic") return floor(mul(part, twoTo(bits))) + random >= 1n << BigInt(bits);
  const side = compare(part, HALF);
  return side > 0 || (side === 0 && (odd || rounding === "nearest_away"));
}

/** @param {Format} fmt @param {"saturate" | "ieee"} overflow @param {bigint} limit the largest finite magnitude code */
function infinity(fmt, overflow, limit) {
  return overflow === "saturate" ? limit : (fmt.infCode ?? fmt.nanCode);
}

/** Put the sign on a magnitude code; NaN carries none. @param {bigint} code @param {boolean} negative @param {Format} fmt */
function signed(code, negative, fmt) {
  if (!negative || fmt.isNan(code)) return code;
  if (fmt.twosComplement) return code ? 2n * fmt.signBit - code : 0n;
  if (!fmt.row.signed) return fmt.magnitude(code).n === 0n ? code : fmt.hasNan ? fmt.nanCode : 0n;
  return code === 0n && !fmt.hasNegativeZero ? code : code | fmt.signBit;
}

/** Round to a codebook: it saturates, and a tie goes to the even index.
 * @param {Exact} value @param {Format} fmt @param {Rounding} rounding @param {bigint} random */
function nearestLevel(value, fmt, rounding, random) {
  const { levels } = fmt;
  const top = levels.length - 1;
  if (against(levels[top], value) <= 0) return BigInt(top);
  if (against(levels[0], value) >= 0) return 0n;
  const number = fraction(value);
  let upper = levels.findIndex((level) => compare(level, number) > 0);
  let lower = upper - 1;
  if (compare(levels[lower], number) === 0) return BigInt(lower);
  if (number.n < 0n) [lower, upper] = [upper, lower]; // the neighbours as magnitudes: the inner one first
  const inner = abs(levels[lower]);
  const part = div(sub(abs(number), inner), sub(abs(levels[upper]), inner));
  const away = rounding === "up" ? number.n > 0n : rounding === "down" ? number.n < 0n : null;
  const word = random >> BigInt(RANDOM_BITS - CODEBOOK_RANDOM_BITS);
  return BigInt(choosesUpper(part, lower % 2 === 1, rounding, away, word, CODEBOOK_RANDOM_BITS) ? upper : lower);
}
