// Light or dark: as the system says, or as chosen here. The choice is not kept: the page stores nothing.

import { byId } from "./dom.js";

const ORDER = ["auto", "light", "dark"];

/** Let the button go through the three choices. */
export function start() {
  const button = byId("theme");
  let at = 0;
  button.addEventListener("click", () => {
    at = (at + 1) % ORDER.length;
    const choice = ORDER[at];
    if (choice === "auto") document.documentElement.removeAttribute("data-theme");
    else document.documentElement.setAttribute("data-theme", choice);
    button.textContent = `Theme: ${choice}`;
  });
}
