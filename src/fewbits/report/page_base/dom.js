// Making elements.

/** @typedef {Record<string, string | number | boolean | null | EventListener>} Attributes */
/** @typedef {Node | string | null} Child */

const SVG = "http://www.w3.org/2000/svg";

/**
 * An HTML element. Attributes that begin with "on" are listeners; true is an empty attribute, false and null are none.
 * @template {keyof HTMLElementTagNameMap} T
 * @param {T} tag @param {Attributes} [attributes] @param {...Child} children @returns {HTMLElementTagNameMap[T]}
 */
export function h(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  fill(element, attributes, children);
  return element;
}

/**
 * An SVG element.
 * @template {keyof SVGElementTagNameMap} T
 * @param {T} tag @param {Attributes} [attributes] @param {...Child} children @returns {SVGElementTagNameMap[T]}
 */
export function s(tag, attributes = {}, ...children) {
  const element = document.createElementNS(SVG, tag);
  fill(element, attributes, children);
  return element;
}

/** @param {Element} element @param {Attributes} attributes @param {Child[]} children */
function fill(element, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (typeof value === "function") element.addEventListener(name.slice(2), value);
    else if (value !== false && value !== null) element.setAttribute(name, value === true ? "" : String(value));
  }
  element.append(...children.filter((child) => child !== null));
}

/**
 * The element with this id.
 * @template {Element} [T=HTMLElement]
 * @param {string} id @returns {T}
 */
export function byId(id) {
  const element = document.getElementById(id);
  if (!element) throw new Error(`the page has no #${id}`);
  return /** @type {T} */ (/** @type {unknown} */ (element));
}

/**
 * A select with its label.
 * @param {string} label @param {readonly (readonly [string, string])[]} options value and text
 * @param {string} chosen @param {(value: string) => void} change
 */
export function select(label, options, chosen, change) {
  const field = h("select", { "aria-label": label });
  for (const [value, text] of options) field.append(h("option", { value, selected: value === chosen }, text));
  field.addEventListener("change", () => change(field.value));
  return h("label", { class: "field" }, h("span", {}, label), field);
}

/**
 * A slider with its label and what its value means.
 * @param {string} label @param {{ min: number, max: number, step?: number, value: number, id?: string }} range
 * @param {(value: number) => string} says @param {(value: number) => void} change
 */
export function slider(label, { min, max, step = 1, value, id }, says, change) {
  const output = h("output", {}, says(value));
  const field = h("input", { type: "range", min, max, step, value, "aria-label": label, id: id ?? null });
  field.setAttribute("aria-valuetext", says(value));
  field.addEventListener("input", () => {
    output.textContent = says(field.valueAsNumber);
    field.setAttribute("aria-valuetext", says(field.valueAsNumber));
    change(field.valueAsNumber);
  });
  return h("label", { class: "field slider" }, h("span", {}, label, " ", output), field);
}

/** Choices of which any number are pressed. @param {string} label @param {readonly string[]} names
 * @param {Set<string>} on is changed @param {() => void} change */
export function toggles(label, names, on, change) {
  const group = h("div", { class: "chips", role: "group", "aria-label": label });
  for (const name of names) {
    const chip = h("button", { type: "button", class: "chip", "aria-pressed": String(on.has(name)) }, name);
    chip.addEventListener("click", () => {
      if (!on.delete(name)) on.add(name);
      chip.setAttribute("aria-pressed", String(on.has(name)));
      change();
    });
    group.append(chip);
  }
  return group;
}

/** Draw again whenever the width of an element changes; the first time at once.
 * @param {Element} element @param {(width: number) => void} draw */
export function onWidth(element, draw) {
  let last = 0;
  new ResizeObserver(() => {
    const width = Math.floor(element.clientWidth);
    if (width && width !== last) draw(width);
    last = width;
  }).observe(element);
}
