// Modules by name: which layer they are in, and what they are there.

/**
 * One stack of layers, such as model.layers: what is in each.
 * @typedef {object} Stack
 * @property {string} name
 * @property {number[]} layers ascending
 * @property {{ name: string, cells: Map<number, number[]> }[]} kinds by layer, which modules; several where experts are
 */

/**
 * Modules in stacks of layers, and those that are in none. A number within a layer, as of an expert, is any number.
 * @param {readonly string[]} names @returns {{ stacks: Stack[], outside: number[] }} modules by their place in `names`
 */
export function arrange(names) {
  /** @type {Map<string, Map<string, Map<number, number[]>>>} */
  const stacks = new Map();
  /** @type {number[]} */
  const outside = [];
  names.forEach((name, index) => {
    const found = /^(.*?)\.(\d+)\.(.+)$/.exec(name);
    if (!found) {
      outside.push(index);
      return;
    }
    const [, stack, layer, rest] = found;
    const kinds = inside(stacks, stack, () => new Map());
    const cells = inside(kinds, rest.replace(/(^|\.)\d+(?=\.|$)/g, "$1*"), () => new Map());
    inside(cells, Number(layer), () => /** @type {number[]} */ ([])).push(index);
  });
  return { stacks: [...stacks].map(([name, kinds]) => stackOf(name, kinds)), outside };
}

/** @param {string} name @param {Map<string, Map<number, number[]>>} kinds @returns {Stack} */
function stackOf(name, kinds) {
  const layers = [...new Set([...kinds.values()].flatMap((cells) => [...cells.keys()]))].sort((a, b) => a - b);
  const short = [...kinds.keys()].map((kind) => kind.split(".").at(-1) ?? kind);
  const unlike = new Set(short).size === short.length;
  const named = [...kinds].map(([kind, cells], index) => ({ name: unlike ? short[index] : kind, cells }));
  return { name, layers, kinds: named };
}

/** What a map has for a key, made where it has none. @template K, V
 * @param {Map<K, V>} map @param {K} key @param {() => V} make @returns {V} */
function inside(map, key, make) {
  const known = map.get(key);
  if (known !== undefined) return known;
  const made = make();
  map.set(key, made);
  return made;
}
