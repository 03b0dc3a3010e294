// What fewbits has put into the page: the catalog and the rest of page_data(), and formats found by name.

import { byId } from "../page_base/dom.js";
import { parse } from "./by_name.js";
import { Format } from "./format.js";

/** @typedef {import("./format.js").Row} Row */
/** @typedef {{ name: string, what: string, seen: string, overflow: "saturate" | "ieee", formats: Record<string, "saturate" | "ieee">, notes: Record<string, string> }} Dialect */
/** @typedef {{ name: string, size: number, scale: string, divisor: number, lowest: number }} Group */
/** @typedef {{ name: string }} Stored */
/** @typedef {{ name: string, parts: [string, number][] }} Training */
/** @typedef {{ name: string, parameters: number, bits: Record<string, number>, weights: Record<string, number>, cache: Record<string, number>, cache_int8: number }} Model */
/** @typedef {{ name: string, kind: string, exponents: Record<string, number>, zeros: number, largest?: number }} Histogram */
/** @typedef {{ what?: string, modules: Histogram[] }} Gradients */
/**
 * @typedef {object} PageData
 * @property {Row[]} formats
 * @property {Dialect[]} dialects
 * @property {string[]} roundings
 * @property {string[]} overflows
 * @property {Record<string, string[]>} scale_rules
 * @property {Group[]} groups
 * @property {Stored[]} precisions
 * @property {Training[]} trainings
 * @property {Model[]} models
 * @property {Gradients} gradients
 */

/** @type {PageData} */
export const data = JSON.parse(byId("data").textContent ?? "");

/** Every format of the catalog, in its order. */
export const catalog = data.formats.map((row) => new Format(row));

const BY_ALIAS = new Map(catalog.flatMap((fmt) => [fmt.name, ...fmt.row.aliases].map((alias) => [alias, fmt])));

/** Those that are a code for each number, without the blocks. */
export const scalars = catalog.filter((fmt) => fmt.row.block === null);

/**
 * The format of a name, an alias or an eXmY name, in any case.
 * @param {string} name @returns {Format} @throws {Error} there is none
 */
export function named(name) {
  const wanted = name.trim().toLowerCase();
  const found = BY_ALIAS.get(wanted) ?? parse(wanted);
  if (found) return found;
  throw new Error(`There is no format “${name.trim()}”: take one of the list, or a name such as e5m3 or e3m4fn`);
}
