// Logarithmic axes.

/** Powers of ten from below the least to above the most. @param {readonly number[]} values all above 0 */
export function decades(values) {
  const low = Math.floor(Math.log10(Math.min(...values)) + 1e-9);
  const high = Math.max(Math.ceil(Math.log10(Math.max(...values)) - 1e-9), low + 1);
  return Array.from({ length: high - low + 1 }, (_, index) => 10 ** (low + index));
}

/** Marks on a scale of powers of two: the powers and, where the span is short, what is between. @param {number} low @param {number} high */
export function doublings(low, high) {
  const fine = high / low < 9 ? [1, 1.25, 1.5, 1.75] : [1, 1.5];
  const ticks = [];
  for (let power = 2 ** Math.floor(Math.log2(low)); power <= high; power *= 2) {
    for (const part of fine) if (power * part >= low && power * part <= high) ticks.push(power * part);
  }
  return ticks;
}

/** @param {number} value a power of ten */
export function powerOfTen(value) {
  const power = Math.round(Math.log10(value));
  if (power >= -3 && power <= 2) return String(Number((10 ** power).toPrecision(1)));
  return `10${String(power).replace(/[-\d]/g, (digit) => (digit === "-" ? "⁻" : "⁰¹²³⁴⁵⁶⁷⁸⁹"[Number(digit)]))}`;
}
