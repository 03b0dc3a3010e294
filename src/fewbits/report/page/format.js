// One number format: a row of the catalog, and all that follows from its fields. Nothing here knows a format by name.
//
// A code is a sign, an exponent field E and a mantissa field M, the highest bits first:
//
//   S EEEEE MMMMMMMMMM     value = (-1)^S · 2^(E - bias) · (1 + M / 2^mantissa_bits)      E > 0, normal
//                          value = (-1)^S · 2^(1 - bias) · (    M / 2^mantissa_bits)      E = 0, subnormal
//
// An integer is nothing but the subnormal line, in two's complement. A codebook lists its values.

import { div, fromNumber, mul, rational, twoTo } from "./rational.js";

/** @typedef {import("./rational.js").Rational} Rational */

/**
 * A row of the catalog, as fewbits exports it.
 * @typedef {object} Row
 * @property {string} name
 * @property {"float" | "integer" | "codebook"} kind
 * @property {number} exponent_bits
 * @property {number} mantissa_bits
 * @property {number} bias
 * @property {boolean} signed
 * @property {"ieee" | "fn" | "fnuz" | "p3109" | "finite"} specials
 * @property {boolean} has_subnormals
 * @property {boolean} narrow
 * @property {number[]} codebook
 * @property {number} storage_bits
 * @property {{ size: number, scale: string, tensor_scale: string | null } | null} block
 * @property {string} use
 * @property {string} section
 * @property {string[]} aliases
 */

/** Codes are BigInts: those of fp64 do not fit a double. */
export class Format {
  /** @param {Row} row */
  constructor(row) {
    this.row = row;
    this.name = row.name;
    const sign = row.signed && row.kind !== "codebook";
    /** Widths of sign, exponent and mantissa. */
    this.fields = [Number(sign), row.exponent_bits, row.mantissa_bits];
    /** Bits of one code. */
    this.bits = this.fields[0] + this.fields[1] + this.fields[2];
    /** The mask of the sign bit; codes below it are the magnitudes. */
    this.signBit = 1n << BigInt(row.exponent_bits + row.mantissa_bits);
    this.mantissaBits = BigInt(row.mantissa_bits);
    this.twosComplement = row.kind === "integer" && row.signed;
    /** The values of a codebook, exact and ascending. */
    this.levels = row.codebook.map(fromNumber);
  }

  /** The code of +Inf, null where there is none. @returns {bigint | null} */
  get infCode() {
    if (this.row.specials === "ieee") return this.signBit - (1n << this.mantissaBits);
    return this.row.specials === "p3109" ? this.signBit - 1n : null;
  }

  /** The code of the largest finite value. */
  get maxCode() {
    if (this.row.specials === "fn") return this.signBit - 2n;
    return this.infCode === null ? this.signBit - 1n : this.infCode - 1n;
  }

  /** The one code that every NaN becomes; where there is no NaN, the largest value or zero. */
  get nanCode() {
    const { kind, specials } = this.row;
    if (kind === "integer") return 0n;
    if (kind === "codebook") return BigInt(this.row.codebook.indexOf(0));
    if (specials === "ieee" && this.mantissaBits) return (this.infCode ?? 0n) | (1n << (this.mantissaBits - 1n));
    if (specials === "fn") return this.signBit - 1n;
    return this.missesNegativeZero ? this.signBit : this.maxCode;
  }

  get hasInf() {
    return this.infCode !== null;
  }

  get hasNan() {
    const { specials } = this.row;
    return specials === "fn" || this.missesNegativeZero || (specials === "ieee" && this.mantissaBits > 0n);
  }

  /** Whether NaN lies where -0 would. */
  get missesNegativeZero() {
    return this.row.specials === "fnuz" || this.row.specials === "p3109";
  }

  get hasNegativeZero() {
    return this.row.kind === "float" && this.row.signed && !this.missesNegativeZero;
  }

  /** The exponent of the smallest normal value; of an integer, which is all subnormals, that of the sign bit. */
  get emin() {
    if (this.row.kind === "integer") return this.row.mantissa_bits - this.row.bias;
    return Number(this.row.has_subnormals) - this.row.bias;
  }

  /** The significant bits of a normal value. */
  get significantBits() {
    return this.row.mantissa_bits + Number(this.row.kind === "float");
  }

  /** The largest finite value. @returns {Rational} */
  get max() {
    return this.row.kind === "codebook" ? this.levels[this.levels.length - 1] : this.magnitude(this.maxCode);
  }

  /** The magnitude code of the least value: one more than the largest in two's complement. */
  get leastCode() {
    return this.maxCode + BigInt(this.twosComplement && !this.row.narrow);
  }

  /**
   * The value of a code without its sign, as if no code were Inf or NaN: the series of finite values goes on.
   * @param {bigint} code @returns {Rational}
   */
  magnitude(code) {
    const exponent = code >> this.mantissaBits;
    const mantissa = code & ((1n << this.mantissaBits) - 1n);
    const last = this.emin - this.row.mantissa_bits; // the exponent of the last place of the smallest values
    if (exponent === 0n && this.row.has_subnormals) return mul(rational(mantissa), twoTo(last));
    const steps = Number(exponent) - Number(this.row.has_subnormals);
    return mul(rational((1n << this.mantissaBits) + mantissa), twoTo(steps + last));
  }

  /** Whether a code is NaN. @param {bigint} code */
  isNan(code) {
    const magnitude = code & (this.signBit - 1n);
    if (this.row.specials === "ieee") return magnitude > (this.infCode ?? 0n);
    if (this.row.specials === "fn") return magnitude === this.signBit - 1n;
    return this.missesNegativeZero && code === this.signBit;
  }

  /** The distance from 1 to the next larger value, or of a codebook the next smaller one. @returns {Rational} */
  get eps() {
    if (this.row.kind !== "codebook")
      return twoTo(this.row.kind === "integer" ? -this.row.bias : -this.row.mantissa_bits);
    const count = this.row.codebook.length;
    return div(fromNumber(this.row.codebook[count - 1] - this.row.codebook[count - 2]), rational(1));
  }
}
