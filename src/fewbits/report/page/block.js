// A block of numbers that share a scale, in exact arithmetic: the same steps as fewbits.formats.exact_block and, for
// integers in groups, as fewbits.tensors.quantized.

import { decode, encode, fraction } from "./codec.js";
import { abs, add, compare, div, floor, floorLog2, mul, ONE, rational, twoTo, ZERO } from "./rational.js";

/** @typedef {import("./rational.js").Rational} Rational */
/** @typedef {import("./format.js").Format} Format */
/** @typedef {"floor" | "ceil" | "even" | "rceil" | "two_level" | "one_level"} ScaleRule */

/**
 * How a block is stored.
 * @typedef {object} Scheme
 * @property {string} name
 * @property {Format} element
 * @property {number} size values that share a scale
 * @property {Format} scale format of the scale
 * @property {Format | null} tensorScale format of a second scale for the whole tensor
 * @property {Rational | null} divisor integers in groups: the scale is the largest magnitude divided by this, rounded up
 * @property {bigint | null} lowest the least integer that is used
 */

/**
 * One block as it is stored, with the values that it stands for.
 * @typedef {object} Stored
 * @property {bigint} scaleCode
 * @property {Rational} scale with that of the tensor
 * @property {bigint[]} codes
 * @property {Rational[]} values
 */

/**
 * Store finite numbers, cut into blocks.
 * @param {readonly Rational[]} values @param {Scheme} scheme @param {ScaleRule} [rule]
 * @returns {{ tensor: Rational, blocks: Stored[] }}
 */
export function store(values, scheme, rule = scheme.tensorScale ? "two_level" : "floor") {
  const two = scheme.tensorScale && rule !== "one_level";
  const tensor = two ? tensorScale(values, scheme) : ONE;
  const blocks = [];
  for (let start = 0; start < values.length; start += scheme.size) {
    blocks.push(storeBlock(values.slice(start, start + scheme.size), scheme, rule, tensor));
  }
  return { tensor, blocks };
}

/** @param {readonly Rational[]} values @param {Scheme} scheme @param {ScaleRule} rule @param {Rational} tensor @returns {Stored} */
function storeBlock(values, scheme, rule, tensor) {
  const scaleCode = scheme.divisor
    ? groupScale(values, scheme, scheme.divisor)
    : blockScale(values, scheme, rule, tensor);
  const scale = mul(fraction(decode(scaleCode, scheme.scale)), tensor);
  const codes = values.map((value) => {
    if (value.n === 0n || scale.n === 0n) return encode(ZERO, scheme.element, "nearest_even", "saturate");
    const code = encode(div(value, scale), scheme.element, "nearest_even", "saturate");
    const least = scheme.lowest === null ? null : rational(scheme.lowest);
    const below = least !== null && compare(fraction(decode(code, scheme.element)), least) < 0;
    return below && least ? encode(least, scheme.element) : code;
  });
  return { scaleCode, scale, codes, values: codes.map((code) => mul(fraction(decode(code, scheme.element)), scale)) };
}

/** The scale of a whole tensor: it maps the largest magnitude to the largest element times the largest scale.
 * @param {readonly Rational[]} values @param {Scheme} scheme @returns {Rational} */
function tensorScale(values, scheme) {
  const top = largest(values);
  if (top.n === 0n || !scheme.tensorScale) return ONE;
  const code = encode(
    div(top, mul(scheme.scale.max, scheme.element.max)),
    scheme.tensorScale,
    "nearest_even",
    "saturate",
  );
  return fraction(decode(code > 0n ? code : 1n, scheme.tensorScale));
}

/** The code of a block's scale. @param {readonly Rational[]} values @param {Scheme} scheme @param {ScaleRule} rule @param {Rational} tensor */
function blockScale(values, { element, scale, tensorScale: second }, rule, tensor) {
  const top = largest(values);
  if (top.n === 0n) return 0n;
  if (second) {
    const code = encode(div(top, mul(element.max, tensor)), scale);
    return code > 0n ? code : 1n;
  }
  const code = BigInt(scaleExponent(top, element, rule) + scale.row.bias);
  return code < 0n ? 0n : code > scale.maxCode ? scale.maxCode : code;
}

/** The exponent of a scale that is a power of two. @param {Rational} top @param {Format} element @param {ScaleRule} rule */
function scaleExponent(top, element, rule) {
  const emax = floorLog2(element.max);
  if (rule === "ceil") return -floorLog2(div(ONE, top)) - emax;
  if (rule === "even") return floorLog2(toPrecision(top, element)) - emax;
  if (rule === "rceil") return -floorLog2(div(element.max, top));
  return floorLog2(top) - emax;
}

/** Round to the significant bits of the element, a tie up. @param {Rational} value @param {Format} element @returns {Rational} */
function toPrecision(value, element) {
  const fractionBits = element.row.mantissa_bits - Number(element.row.kind === "integer");
  const quantum = twoTo(floorLog2(value) - fractionBits);
  return mul(rational(floor(add(div(value, quantum), rational(1, 2)))), quantum);
}

/** The code of a group's scale, rounded up. @param {readonly Rational[]} values @param {Scheme} scheme @param {Rational} divisor */
function groupScale(values, scheme, divisor) {
  const top = largest(values);
  return top.n === 0n ? 0n : encode(div(top, divisor), scheme.scale, "up", "saturate");
}

/** @param {readonly Rational[]} values @returns {Rational} */
function largest(values) {
  return values.map(abs).reduce((a, b) => (compare(a, b) >= 0 ? a : b), ZERO);
}
