// Tokens as text that can be seen, and colours for what was measured at each.

/** @typedef {import("./data.js").PageData} PageData */
/** @typedef {import("./data.js").Row} Row */
/** @typedef {"kl" | "loss" | "difference"} Measure */

// What has no shape of its own, or would turn the direction of the line: shown by its code. ZWJ and the like stay,
// since emoji and scripts are written with them.
// biome-ignore lint/suspicious/noControlCharactersInRegex: they are what is looked for
const UNSEEN = /[\u0000-\u0008\u000b-\u001f\u007f-\u009f\u2028\u2029\u202a-\u202e\u2060-\u2069\ufeff]/g;

/** A token as it is written into the text. @param {string} token */
export function visible(token) {
  if (token === "") return "▯";
  return token
    .replace(UNSEEN, (found) => `⟨${found.codePointAt(0)?.toString(16).toUpperCase().padStart(4, "0")}⟩`)
    .replace(/\n/g, "↵\n");
}

/** A token on one line, in quotation marks. @param {string} token */
export function quoted(token) {
  return `“${visible(token).replace(/\n/g, "").replace(/\t/g, "⇥")}”`;
}

/** What was measured at a token. @param {Measure} measure @param {Row} row @param {Row | null} reference
 * @param {number} window @param {number} token @returns {number | null} */
export function measured(measure, row, reference, window, token) {
  if (measure === "kl") return row.kls[window]?.[token] ?? null;
  const loss = row.losses[window]?.[token] ?? null;
  if (measure === "loss") return loss;
  const other = reference?.losses[window]?.[token] ?? null;
  return loss === null || other === null ? null : loss - other;
}

/**
 * How strong a colour is, −1 to 1, the same for every model. KL over three powers of ten; losses in proportion; a
 * difference by its root, so that small ones are seen.
 * @param {Measure} measure @param {PageData} data @param {Row | null} reference
 */
export function scaleOf(measure, data, reference) {
  const values = [];
  for (const row of data.rows) {
    if (row === reference && measure !== "loss") continue;
    for (let window = 0; window < data.tokens.length; window += 1) {
      for (let token = 0; token < data.tokens[window].length; token += 1) {
        const value = measured(measure, row, reference, window, token);
        if (value !== null) values.push(Math.abs(value));
      }
    }
  }
  values.sort((a, b) => a - b);
  const most = values[Math.floor((values.length - 1) * 0.998)] || 1;
  const strength = (/** @type {number} */ value) => {
    const part = Math.min(Math.abs(value) / most, 1);
    if (measure === "kl") return part > 1e-3 ? 1 + Math.log10(part) / 3 : 0;
    return measure === "loss" ? part : Math.sign(value) * Math.sqrt(part);
  };
  return { most, strength, some: values.length > 0 };
}
