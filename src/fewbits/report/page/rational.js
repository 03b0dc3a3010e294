// Exact fractions of BigInts. They are not reduced: only what is printed in full has to be.

/**
 * A fraction n / d, d > 0.
 * @typedef {{ readonly n: bigint, readonly d: bigint }} Rational
 */

/** @type {Rational} */
export const ZERO = { n: 0n, d: 1n };
/** @type {Rational} */
export const ONE = { n: 1n, d: 1n };

const LARGEST_POWER = 1n << 1023n; // that a double holds

/** @param {bigint | number} n @param {bigint | number} [d] @returns {Rational} */
export function rational(n, d = 1n) {
  const [top, bottom] = [BigInt(n), BigInt(d)];
  return bottom < 0n ? { n: -top, d: -bottom } : { n: top, d: bottom };
}

/** 2^exponent, exact. @param {number} exponent @returns {Rational} */
export function twoTo(exponent) {
  return exponent >= 0 ? { n: 1n << BigInt(exponent), d: 1n } : { n: 1n, d: 1n << BigInt(-exponent) };
}

/** The exact value of a finite double. @param {number} value @returns {Rational} */
export function fromNumber(value) {
  let exponent = 0;
  let whole = value;
  while (!Number.isInteger(whole)) {
    whole *= 2; // exact: subnormals become normal, and nothing that has a fraction is large
    exponent -= 1;
  }
  return mul(rational(whole), twoTo(exponent));
}

/** The nearest double; beyond its range Infinity or 0. @param {Rational} a @returns {number} */
export function toNumber(a) {
  if (a.n === 0n || a.d === 1n) return Number(a.n);
  const top = abs(a);
  // Both are doubles exactly, so their quotient is rounded once.
  if (top.n < 1n << 53n && a.d <= LARGEST_POWER && (a.d & (a.d - 1n)) === 0n) return Number(a.n) / Number(a.d);
  const exponent = floorLog2(top);
  const last = Math.max(exponent - 52, -1074); // the exponent of the double's last bit
  const scaled = div(top, twoTo(last));
  const twice = (2n * scaled.n) / scaled.d;
  const exactly = twice * scaled.d === 2n * scaled.n;
  const half = twice & 1n;
  let whole = twice >> 1n;
  if (half && (!exactly || whole & 1n)) whole += 1n;
  const value = last > 900 ? Number(whole) * 2 ** 900 * 2 ** (last - 900) : Number(whole) * 2 ** last;
  return a.n < 0n ? -value : value;
}

/** @param {Rational} a @param {Rational} b @returns {Rational} */
export function add(a, b) {
  return a.d === b.d ? { n: a.n + b.n, d: a.d } : { n: a.n * b.d + b.n * a.d, d: a.d * b.d };
}

/** @param {Rational} a @param {Rational} b @returns {Rational} */
export function sub(a, b) {
  return add(a, neg(b));
}

/** @param {Rational} a @param {Rational} b @returns {Rational} */
export function mul(a, b) {
  return { n: a.n * b.n, d: a.d * b.d };
}

/** @param {Rational} a @param {Rational} b not zero @returns {Rational} */
export function div(a, b) {
  return rational(a.n * b.d, a.d * b.n);
}

/** @param {Rational} a @returns {Rational} */
export function neg(a) {
  return { n: -a.n, d: a.d };
}

/** @param {Rational} a @returns {Rational} */
export function abs(a) {
  return a.n < 0n ? neg(a) : a;
}

/** Negative, zero or positive, as a − b is. @param {Rational} a @param {Rational} b @returns {number} */
export function compare(a, b) {
  const left = a.n * b.d;
  const right = b.n * a.d;
  return left < right ? -1 : left > right ? 1 : 0;
}

/** The largest integer that is at most a. @param {Rational} a @returns {bigint} */
export function floor(a) {
  const whole = a.n / a.d;
  return a.n < 0n && whole * a.d !== a.n ? whole - 1n : whole;
}

/** floor(log2 a), a > 0; by bit lengths, since a logarithm would round. @param {Rational} a @returns {number} */
export function floorLog2(a) {
  const guess = bitLength(a.n) - bitLength(a.d);
  return compare(twoTo(guess), a) <= 0 ? guess : guess - 1;
}

/** Bits of a positive integer. @param {bigint} n @returns {number} */
export function bitLength(n) {
  const digits = n.toString(16);
  return 4 * digits.length - Math.clz32(Number.parseInt(digits[0], 16)) + 28;
}

/** In lowest terms. @param {Rational} a @returns {Rational} */
export function reduced(a) {
  let [x, y] = [a.n < 0n ? -a.n : a.n, a.d];
  while (y) [x, y] = [y, x % y];
  return { n: a.n / x, d: a.d / x };
}
