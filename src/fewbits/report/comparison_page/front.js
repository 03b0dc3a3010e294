// Which models are worth choosing, and where their names fit beside their points.

/** @typedef {{ x: number, y: number }} Place */

/**
 * The Pareto front, by rising x: places that no other is at or below in both.
 * @template {Place} T
 * @param {readonly T[]} places @returns {T[]}
 */
export function front(places) {
  const sorted = [...places].sort((a, b) => a.x - b.x || a.y - b.y);
  let best = Infinity;
  return sorted.filter(({ y }) => {
    if (y >= best) return false;
    best = y;
    return true;
  });
}

/** @typedef {{ left: number, top: number, right: number, bottom: number }} Box */

const HEIGHT = 15;
const APART = 10;

/**
 * Where to write a name: right of its point, left, above or below, or wherever nothing is in the way first.
 * @param {Place} point in pixels @param {number} width of the name @param {readonly Box[]} taken @param {Box} inside
 * @returns {{ x: number, y: number, anchor: "start" | "middle" | "end", box: Box }} y is the base line
 */
export function placeLabel({ x, y }, width, taken, inside) {
  /** @type {[number, number, "start" | "middle" | "end"][]} */
  const tries = [
    [APART, 4, "start"],
    [-APART, 4, "end"],
    [0, -APART - 2, "middle"],
    [0, APART + HEIGHT - 3, "middle"],
    [APART, -APART, "start"],
    [APART, APART + HEIGHT - 5, "start"],
    [-APART, -APART, "end"],
    [-APART, APART + HEIGHT - 5, "end"],
    [APART, -APART - HEIGHT, "start"],
    [-APART, APART + 2 * HEIGHT - 5, "end"],
  ];
  const places = tries.map(([dx, dy, anchor]) => {
    const left = x + dx - { start: 0, middle: width / 2, end: width }[anchor];
    const bottom = y + dy + 3;
    return { x: x + dx, y: y + dy, anchor, box: { left, right: left + width, top: bottom - HEIGHT, bottom } };
  });
  const within = places.filter(
    ({ box }) =>
      box.left >= inside.left && box.right <= inside.right && box.top >= inside.top && box.bottom <= inside.bottom,
  );
  return within.find(({ box }) => !taken.some((other) => overlap(box, other))) ?? within[0] ?? places[0];
}

/** @param {Box} a @param {Box} b */
function overlap(a, b) {
  return a.left < b.right && b.left < a.right && a.top < b.bottom && b.top < a.bottom;
}
