// How many bytes a model takes: weights, the cache of keys and values, and training.

/** @typedef {import("./data.js").Stored} Stored */
/** @typedef {import("./format.js").Format} Format */

/**
 * @typedef {object} Size
 * @property {number} parameters
 * @property {number} embedding of them, those of the embedding and the output head
 * @property {number} layers
 * @property {number} kvWidth key heads times their width
 */

const SCALE_BITS = 16;

/** Bits that each quantized weight takes, its share of the scale included. @param {Stored} stored @param {Format} weights */
export function bitsPerWeight(stored, weights) {
  return weights.bits + (stored.group_size === null ? 0 : SCALE_BITS / stored.group_size);
}

/** Bytes of the weights. @param {Size} size @param {Stored} stored @param {Format} weights */
export function weightBytes(size, stored, weights) {
  const bits = bitsPerWeight(stored, weights);
  if (stored.cast) return (size.parameters * bits) / 8;
  return ((size.parameters - size.embedding) * bits) / 8 + (size.embedding * 16) / 8;
}

/** Bytes of keys and values. @param {Size} size @param {number} tokens in all sequences @param {number} bits of each value */
export function cacheBytes(size, tokens, bits) {
  return (2 * size.layers * size.kvWidth * tokens * bits) / 8;
}
