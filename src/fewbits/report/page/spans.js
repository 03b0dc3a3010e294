// What a format spans, in powers of two, and how many significant bits it has at each.

import { floorLog2, toNumber } from "./rational.js";

/** @typedef {import("./format.js").Format} Format */

/**
 * From where to where a format goes, as exponents.
 * @typedef {object} Span
 * @property {string} name
 * @property {number} least log2 of the smallest positive value, with the smallest scale
 * @property {number} normal from here on every value has all its bits; of integers and codebooks the largest exponent
 * @property {number} most log2 of the largest value, with the largest scale
 * @property {number} bits significant ones
 * @property {[number, number] | null} block what one scale spans: from the least to the largest element at scale 1
 */

/** @param {Format} fmt @param {(name: string) => Format} named @returns {Span} */
export function span(fmt, named) {
  const { least, normal, most } = ownSpan(fmt);
  if (!fmt.row.block) return { name: fmt.name, least, normal, most, bits: fmt.significantBits, block: null };
  let [low, high] = [0, 0];
  for (const scale of [fmt.row.block.scale, fmt.row.block.tensor_scale]) {
    if (!scale) continue;
    const of = ownSpan(named(scale));
    [low, high] = [low + of.least, high + of.most];
  }
  const block = /** @type {[number, number]} */ ([least, most]);
  return {
    name: fmt.name,
    least: least + low,
    normal: normal + low,
    most: most + high,
    bits: fmt.significantBits,
    block,
  };
}

/** Without the scale of a block. @param {Format} fmt */
function ownSpan(fmt) {
  const most = Math.log2(toNumber(fmt.max));
  if (fmt.row.kind === "codebook") {
    const smallest = fmt.row.codebook.find((level) => level > 0) ?? 1;
    return { least: Math.log2(smallest), normal: most, most };
  }
  const top = floorLog2(fmt.max);
  const first = floorLog2(fmt.magnitude(fmt.row.has_subnormals ? 1n : 0n));
  return { least: first, normal: fmt.row.kind === "integer" ? top : fmt.emin, most };
}

/** Significant bits at an exponent: all of them from the smallest normal value on, one less for each power below.
 * @param {Span} of @param {number} exponent */
export function bitsAt(of, exponent) {
  if (exponent < of.least || exponent > of.most) return 0;
  return exponent >= of.normal ? of.bits : Math.max(of.bits - (of.normal - Math.floor(exponent)), 1);
}
