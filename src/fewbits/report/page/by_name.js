// Formats that need no row: e5m3, e3m3fn, e4m3b11fnuz, read from the name alone, as fewbits.formats.by_name does.

import { Format } from "./format.js";

const MOST_BITS = 16;

/**
 * The format that an eXmY name spells out, null if the name is not of that shape.
 * @param {string} name @returns {Format | null}
 * @throws {Error} more than 16 bits, a range that a double cannot hold, or too few bits for Inf and NaN
 */
export function parse(name) {
  const match = /^e(\d{1,2})m(\d{1,2})(?:b(\d{1,4}))?(fnuz|fn)?$/.exec(name);
  if (match === null) return null;
  const [exponentBits, mantissaBits, suffix] = [Number(match[1]), Number(match[2]), match[4] ?? ""];
  const bits = 1 + exponentBits + mantissaBits;
  if (bits > MOST_BITS) throw new Error(`${name} has ${bits} bits: eXmY names reach to ${MOST_BITS}, sign included`);
  if (exponentBits < 1) throw new Error(`${name} has no exponent: use an integer format such as int8`);
  if (!suffix && (exponentBits < 2 || mantissaBits < 1)) {
    throw new Error(`${name} is too narrow for Inf and NaN: use ${name}fn, which is finite`);
  }
  const bias = match[3] === undefined ? 2 ** (exponentBits - 1) - Number(suffix !== "fnuz") : Number(match[3]);
  const specials = suffix === "fnuz" ? "fnuz" : suffix === "" ? "ieee" : bits > 6 ? "fn" : "finite";
  const top = 2 ** exponentBits - 1 - Number(specials === "ieee") - bias;
  if (bias > 1023 || top > 1023) throw new Error(`${name} exceeds the range of a double: take fewer exponent bits`);
  return new Format({
    name,
    kind: "float",
    exponent_bits: exponentBits,
    mantissa_bits: mantissaBits,
    bias,
    signed: true,
    specials,
    has_subnormals: true,
    narrow: false,
    codebook: [],
    storage_bits: 0,
    block: null,
    use: "read from its name",
    section: "",
    aliases: [],
  });
}
