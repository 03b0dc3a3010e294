// How many bytes a model takes: the numbers of `fewbits plan`, which are in the data, for so many tokens.

/** @typedef {import("./data.js").Model} Model */

/**
 * Bytes of the weights, of a model that is so many times as large.
 * @param {Model} model @param {string} precision @param {number} times
 */
export function weightBytes(model, precision, times) {
  return model.weights[precision] * times;
}

/**
 * Bytes of keys and values of so many tokens in all texts.
 * @param {Model} model @param {string} precision @param {boolean} int8 whether they are kept in int8 @param {number} tokens
 */
export function cacheBytes(model, precision, int8, tokens) {
  return (int8 ? model.cache_int8 : model.cache[precision]) * tokens;
}
