// One token: where it is, how well each model foresaw it, and what they would rather have said.

import { h } from "../page_base/dom.js";
import { data } from "./data.js";
import { fixed, NONE, signed, significant } from "./figures.js";
import { guesses } from "./guesses.js";
import { measured, quoted } from "./tokens.js";

/** @typedef {import("./data.js").Row} Row */

const reference = data.reference === null ? null : data.rows[data.reference];

/** Tell of a token. @param {Element} place @param {Row} chosen @param {number} window @param {number | null} token */
export function tell(place, chosen, window, token) {
  if (token === null) {
    place.replaceChildren(h("p", { class: "note" }, "Choose a token."));
    return;
  }
  const rows = data.rows.filter((row) => row.losses[window]?.length || row.kls[window]?.length);
  const heads = ["", "loss", ...(reference ? ["Δ loss"] : []), "KL"].map((name) => h("th", { scope: "col" }, name));
  const body = rows.map((row) => line(row, row === chosen, window, token));
  const worst = chosen.worst.find((each) => each.window === window && each.token === token);
  place.replaceChildren(
    h("p", { class: "token-name" }, h("code", {}, quoted(data.tokens[window][token]))),
    h(
      "p",
      { class: "note" },
      `Window ${window + 1}, token ${token + 1}${token ? "" : ": the first has nothing to be foreseen from"}`,
    ),
    h("table", {}, h("thead", {}, h("tr", {}, ...heads)), h("tbody", {}, ...body)),
    h("p", { class: "note" }, "In nats; Δ is to the reference. KL is of the predictions made for this token."),
    ...(worst ? [guesses(worst, chosen.label)] : []),
  );
}

/** @param {Row} row @param {boolean} chosen @param {number} window @param {number} token */
function line(row, chosen, window, token) {
  const loss = measured("loss", row, reference, window, token);
  const more = measured("difference", row, reference, window, token);
  const kl = measured("kl", row, reference, window, token);
  return h(
    "tr",
    { class: chosen ? "chosen" : null },
    h("th", { scope: "row" }, row.label),
    h("td", {}, fixed(loss, 3)),
    reference ? h("td", {}, row === reference ? NONE : signed(more, 3)) : null,
    h("td", {}, significant(kl, 2)),
  );
}
