"use strict";
(() => {
  const value = (row, column) => {
    const cell = row.cells[column];
    const text = cell.dataset.sort ?? cell.textContent.trim();
    const number = text === "" ? NaN : Number(text.replaceAll(",", "").replace("\u2212", "-"));
    return { text, number, missing: text === "" || text === "–" };
  };

  // What was not measured stays at the end in either direction.
  const compare = (a, b, sign) => {
    if (a.missing || b.missing) return a.missing - b.missing;
    if (!Number.isNaN(a.number) && !Number.isNaN(b.number)) return sign * (a.number - b.number);
    return sign * a.text.localeCompare(b.text);
  };

  const sort = (table, header) => {
    const column = header.cellIndex;
    const down = header.getAttribute("aria-sort") === "ascending";
    for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
    header.setAttribute("aria-sort", down ? "descending" : "ascending");
    const rows = [...table.tBodies[0].rows].map((row) => [value(row, column), row]);
    rows.sort(([a], [b]) => compare(a, b, down ? -1 : 1));
    table.tBodies[0].append(...rows.map(([, row]) => row));
  };

  for (const table of document.querySelectorAll("table.sortable")) {
    for (const header of table.tHead.rows[0].cells) {
      header.querySelector("button").addEventListener("click", () => sort(table, header));
    }
  }

  const filters = document.querySelector(".filters");
  if (filters) {
    const chosen = { set: "0", outcome: "" };
    const show = () => {
      for (const set of document.querySelectorAll(".answers")) {
        set.hidden = set.dataset.set !== chosen.set;
        let shown = 0;
        for (const example of set.querySelectorAll(".example")) {
          example.hidden = chosen.outcome !== "" && example.dataset.outcome !== chosen.outcome;
          shown += !example.hidden;
        }
        set.querySelector(".none").hidden = shown > 0;
      }
    };
    for (const choices of filters.querySelectorAll(".choices")) {
      choices.addEventListener("click", (event) => {
        const button = event.target.closest("button");
        if (!button) return;
        for (const other of choices.children) other.setAttribute("aria-pressed", String(other === button));
        chosen[choices.dataset.choose] = button.dataset.value;
        show();
      });
    }
    filters.hidden = false;
  }

  // Paper cannot unfold anything.
  addEventListener("beforeprint", () => {
    for (const part of document.querySelectorAll("details:not(.example details)")) part.open = true;
  });
})();
