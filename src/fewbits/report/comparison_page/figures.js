// Figures as text. What was not measured is a dash.

export const NONE = "–";

const UNITS = ["B", "KiB", "MiB", "GiB", "TiB", "PiB"];

/** Three digits and a binary unit. @param {number | null} count */
export function bytes(count) {
  if (count === null) return NONE;
  let power = 0;
  let value = count;
  while (value >= (power ? 999.5 : 1024) && power < UNITS.length - 1) {
    value /= 1024;
    power += 1;
  }
  const decimals = power === 0 || value >= 99.95 ? 0 : value >= 9.995 ? 1 : 2;
  return `${value.toFixed(decimals)} ${UNITS[power]}`;
}

/** So many significant digits, without an exponent where there is a way. @param {number | null} value */
export function significant(value, digits = 3) {
  if (value === null) return NONE;
  if (value !== 0 && Math.abs(value) < 1e-6) return minus(value.toExponential(1));
  return minus(Number(value.toPrecision(digits)).toLocaleString("en", { maximumFractionDigits: 9 }));
}

/** @param {number | null} value @param {number} decimals */
export function fixed(value, decimals) {
  if (value === null) return NONE;
  return minus(value.toLocaleString("en", { minimumFractionDigits: decimals, maximumFractionDigits: decimals }));
}

/**
 * A value with as many decimals as its error has something to say about: one digit of the error, two of 1…
 * @param {number | null} value @param {number | null} error @param {number} decimals where the error is not known
 */
export function withError(value, error, decimals) {
  if (value === null) return NONE;
  if (value === 0 && !error) return "0";
  if (!error || error < 1e-9) return fixed(value, decimals);
  const power = Math.floor(Math.log10(error));
  const leading = error / 10 ** power;
  const places = Math.min(Math.max((leading < 2 ? 1 : 0) - power, 0), 9);
  return `${fixed(value, places)} ± ${fixed(error, places)}`;
}

/** With its error, but more decimals than the error leaves: models on the same text differ by less than texts do.
 * @param {number | null} value @param {number | null} error */
export function perplexity(value, error) {
  return value !== null && error ? `${fixed(value, 3)} ± ${significant(error, 2)}` : fixed(value, 3);
}

/** With a sign always. @param {number | null} value @param {number} decimals */
export function signed(value, decimals) {
  if (value === null) return NONE;
  return value > 0 ? `+${fixed(value, decimals)}` : fixed(value, decimals);
}

/** @param {string} text */
function minus(text) {
  return text.replaceAll("-", "−");
}
