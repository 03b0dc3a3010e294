// Numbers as people write them, read exactly: 0.1 is one tenth here, not the double next to it. And numbers as text.

import { decode } from "./codec.js";
import { abs, add, bitLength, compare, div, floorLog2, mul, neg, rational, reduced, twoTo } from "./rational.js";

/** @typedef {import("./rational.js").Rational} Rational */
/** @typedef {import("./format.js").Format} Format */
/** @typedef {import("./codec.js").Exact} Exact */
/** A number that was read; of a bit pattern with its code and format. @typedef {{ value: Exact, code?: bigint, format?: Format }} Read */

const LARGEST_EXPONENT = 20_000; // beyond it the exact fraction would fill the memory
const HELP =
  "write a decimal (0.1), a fraction (1/3), a hex float (0x1.8p-3), inf, nan, or a bit pattern (0x3C00, bf16:0x3F80)";

/**
 * Read a decimal, fraction, hex float, inf, nan, or the bit pattern of a code.
 * @param {string} text
 * @param {readonly Format[]} formats where to look for the format of a bit pattern: the first that has as many bits
 * @param {(name: string) => Format} named finds the format that a pattern names
 * @returns {Read}
 * @throws {Error} not a number, or a pattern whose width fits none of the formats
 */
export function parse(text, formats, named) {
  const word = text.trim().toLowerCase().replaceAll("−", "-");
  const pattern = /^(?:([\w.]+):)?0(x[0-9a-f_]+|b[01_]+)$/.exec(word);
  if (pattern) return readPattern(text, pattern[1], pattern[2].replaceAll("_", ""), formats, named);
  const plain = word.replaceAll("_", "");
  const special = /^([+-]?)(inf|infinity|nan)$/.exec(plain);
  if (special) return { value: special[2] === "nan" ? Number.NaN : special[1] === "-" ? -Infinity : Infinity };
  const value = readHexFloat(plain) ?? readDecimal(plain);
  if (value === null) throw new Error(`“${text.trim()}” is not a number: ${HELP}`);
  if (!plain.startsWith("-")) return { value };
  return { value: value.n === 0n ? -0 : neg(value) };
}

/** The magnitude of a hex float. @param {string} word @returns {Rational | null} */
function readHexFloat(word) {
  const match = /^[+-]?0x([0-9a-f]*)(?:\.([0-9a-f]*))?p([+-]?\d+)$/.exec(word);
  const digits = match ? match[1] + (match[2] ?? "") : "";
  if (!match || !digits || Math.abs(Number(match[3])) > LARGEST_EXPONENT) return null;
  return mul(rational(BigInt(`0x${digits}`)), twoTo(Number(match[3]) - 4 * (match[2] ?? "").length));
}

/** The magnitude of a decimal or a fraction. @param {string} word @returns {Rational | null} */
function readDecimal(word) {
  const ratio = /^[+-]?(\d+)\/(\d+)$/.exec(word);
  if (ratio) return BigInt(ratio[2]) ? rational(BigInt(ratio[1]), BigInt(ratio[2])) : null;
  const match = /^[+-]?(\d*)(?:\.(\d*))?(?:e([+-]?\d+))?$/.exec(word);
  const digits = match ? match[1] + (match[2] ?? "") : "";
  if (!match || !digits || Math.abs(Number(match[3] ?? 0)) > LARGEST_EXPONENT) return null;
  const power = Number(match[3] ?? 0) - (match[2] ?? "").length;
  return mul(rational(BigInt(digits)), tenTo(power));
}

/** @param {string} text @param {string | undefined} name @param {string} digits with the leading x or b
 * @param {readonly Format[]} formats @param {(name: string) => Format} named @returns {Read} */
function readPattern(text, name, digits, formats, named) {
  const code = BigInt(`0${digits}`);
  const hex = digits[0] === "x";
  const bits = (digits.length - 1) * (hex ? 4 : 1);
  const fits = (/** @type {Format} */ fmt) => fmt.bits === bits || (hex && fmt.bits < bits && fmt.bits > bits - 4);
  const format = name ? named(name) : formats.find(fits);
  if (!format)
    throw new Error(
      `The pattern ${text.trim()} has ${bits} bits, and no format here has as many: name one, as in fp16:0${digits}`,
    );
  if (code >> BigInt(format.bits))
    throw new Error(`The pattern ${text.trim()} has more than the ${format.bits} bits of ${format.name}`);
  return { value: decode(code, format), code, format };
}

/** @param {number} power @returns {Rational} */
function tenTo(power) {
  return power >= 0 ? rational(10n ** BigInt(power)) : rational(1n, 10n ** BigInt(-power));
}

/** A number with nothing left out; with a short approximation where its decimals are many. @param {Exact} value */
export function exactly(value) {
  if (typeof value === "number") return special(value);
  const { n, d } = reduced(value);
  if (d & (d - 1n)) return `${n}/${d}`.replace("-", "−");
  const text = decimal({ n, d });
  return text.length <= (d === 1n ? 15 : 30) ? text : `${approximate(value, 7)} = ${dyadic({ n, d })}`;
}

/** @param {number} value */
function special(value) {
  return Object.is(value, -0) ? "−0" : String(value).replace("Infinity", "Inf").replace("-", "−");
}

/** All decimals of a fraction in lowest terms whose denominator is a power of two. @param {Rational} value */
function decimal(value) {
  const power = value.d.toString(2).length - 1;
  const digits = (abs(value).n * 5n ** BigInt(power)).toString().padStart(power + 1, "0");
  const cut = digits.length - power;
  return (value.n < 0n ? "−" : "") + digits.slice(0, cut) + (power ? `.${digits.slice(cut)}` : "");
}

/** An integer times a power of two: 5 × 2⁻¹⁰⁷⁴. @param {Rational} value in lowest terms, not zero */
function dyadic(value) {
  let [n, power] = [value.n, 1 - bitLength(value.d)];
  while (!(n & 1n)) [n, power] = [n >> 1n, power + 1];
  const long = abs({ n, d: 1n }).n.toString().length > 24;
  const whole = long ? `0x${abs({ n, d: 1n }).n.toString(16).toUpperCase()}` : abs({ n, d: 1n }).n.toString();
  return `${n < 0n ? "−" : ""}${whole === "1" ? "" : `${whole} × `}${powerOfTwo(power)}`;
}

/** 2⁻¹¹. @param {number} exponent */
export function powerOfTwo(exponent) {
  const digits = [...String(Math.abs(exponent))].map((digit) => "⁰¹²³⁴⁵⁶⁷⁸⁹"[Number(digit)]).join("");
  return `2${exponent < 0 ? "⁻" : ""}${digits}`;
}

/**
 * A short decimal, 6.1035e−5; right beyond the range of a double too.
 * @param {Exact} value @param {number} [digits] significant ones
 */
export function approximate(value, digits = 5) {
  if (typeof value === "number") return special(value);
  if (value.n === 0n) return "0";
  const magnitude = abs(value);
  let power = Math.floor(floorLog2(magnitude) * Math.log10(2));
  if (compare(magnitude, tenTo(power + 1)) >= 0) power += 1;
  let whole = roundedTo(magnitude, digits - 1 - power);
  if (whole >= 10n ** BigInt(digits)) whole = roundedTo(magnitude, digits - 1 - ++power);
  const text = whole.toString().replace(/0+$/, "");
  const sign = value.n < 0n ? "−" : "";
  if (power >= 0 && power < 7) return sign + point(text.padEnd(power + 1, "0"), power + 1);
  if (power < 0 && power >= -4) return `${sign}0.${"0".repeat(-power - 1)}${text}`;
  return `${sign}${point(text, 1)}e${power < 0 ? "−" : "+"}${Math.abs(power)}`;
}

/** @param {Rational} magnitude @param {number} places */
function roundedTo(magnitude, places) {
  const { n, d } = add(mul(magnitude, tenTo(places)), rational(1, 2));
  return n / d;
}

/** @param {string} digits @param {number} at */
function point(digits, at) {
  return digits.length > at ? `${digits.slice(0, at)}.${digits.slice(at)}` : digits;
}

/** A share as a percentage. @param {Rational} part @param {Rational} whole not zero */
export function percent(part, whole) {
  return `${approximate(mul(div(abs(part), abs(whole)), rational(100)), 3)} %`;
}

/** The code in as many hexadecimal digits as the format needs. @param {bigint} code @param {Format} fmt */
export function hexadecimal(code, fmt) {
  return `0x${code
    .toString(16)
    .toUpperCase()
    .padStart(Math.ceil(fmt.bits / 4), "0")}`;
}
