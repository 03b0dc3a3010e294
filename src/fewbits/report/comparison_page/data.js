// What fewbits has put into the page: the JSON of a comparison, made ready by comparison_data.py.

import { byId } from "../page_base/dom.js";

/** @typedef {[module: string, format: string, bits: number | null, sqnr: number | null]} Layer */
/** @typedef {[token: string, probability: number | null]} Guess */
/**
 * A position where two models disagree most.
 * @typedef {object} Worst
 * @property {number} window
 * @property {number} token the one that was to be predicted, by its place in the window
 * @property {number | null} kl
 * @property {string} context what was read before
 * @property {string} following the token that came
 * @property {Guess[]} reference what the reference says
 * @property {Guess[]} candidate what this model says
 */
/**
 * One model, measured; what was not measured is null or empty.
 * @typedef {object} Row
 * @property {string} label unlike every other row's
 * @property {string} precision
 * @property {number | null} disk_bytes
 * @property {number | null} memory_bytes
 * @property {number | null} peak_bytes
 * @property {number | null} bits_per_weight
 * @property {number | null} kl
 * @property {number | null} kl_stderr
 * @property {number | null} top1 0 to 1
 * @property {number | null} top1_stderr
 * @property {number | null} perplexity
 * @property {number | null} perplexity_stderr
 * @property {number | null} prefill_tps
 * @property {number | null} decode_tps
 * @property {Layer[]} layers
 * @property {(number | null)[][]} losses by window, of each token
 * @property {(number | null)[][]} kls by window, of the prediction of each token
 * @property {Worst[]} worst
 */
/** @typedef {{ module: string, precision: string, bits: number | null, kl_alone: number | null }} Assigned */
/** @typedef {{ target: string, max_kl: number | null, met: boolean | null, assignment: Assigned[], tried: { bits: number, kl: number }[], left_out: string[] }} Search */
/**
 * @typedef {object} PageData
 * @property {string} about the first sentence: what was held against what, on which text
 * @property {number | null} reference the row that the others are held against
 * @property {number} chosen the row that is looked at first
 * @property {string[]} notes
 * @property {string[]} made machine, versions and date, a line each
 * @property {string[][]} tokens by window
 * @property {number} windows of the text, of which `tokens` may have only the first
 * @property {Row[]} rows
 * @property {Search | null} search
 */

/** @type {PageData} */
export const data = JSON.parse(byId("data").textContent ?? "");
