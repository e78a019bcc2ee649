"use strict";
// Without this script the table is a plain one. With it, only the rows that are shown are in the page: a browser lays
// out a hundred at once, ten thousand in a second or more.
(() => {
  const PAGE = 100;
  const get = (id) => document.getElementById(id);
  const table = get("rows"), body = table.tBodies[0], heads = [...table.tHead.rows[0].cells];
  const rows = [...body.rows].map((row, at) => ({
    row, at, text: row.textContent.toLowerCase(), base: row.cells[1].textContent, state: row.cells[2].textContent,
  }));
  const find = get("find"), state = get("state"), base = get("base"), shown = get("shown"), more = get("more");
  const number = new Intl.NumberFormat("en");
  let found = rows, count = PAGE, column = -1, falling = false;

  // A figure that is no number is the worst one: it comes first, whichever way; a row without a figure comes last.
  const value = (entry) => {
    const cell = entry.row.cells[column];
    if (!heads[column].classList.contains("n")) return cell.textContent.toLowerCase();
    if (!("v" in cell.dataset)) return null;
    const figure = { nan: NaN, inf: Infinity, "-inf": -Infinity }[cell.dataset.v];
    return figure === undefined ? Number(cell.dataset.v) : figure;
  };
  const compare = (a, b) => {
    if (a === null || b === null) return (a === null) - (b === null);
    if (Number.isNaN(a) || Number.isNaN(b)) return Number.isNaN(b) - Number.isNaN(a);
    return (falling ? -1 : 1) * (a < b ? -1 : a > b ? 1 : 0);
  };

  const draw = () => {
    body.replaceChildren(...found.slice(0, count).map((entry) => entry.row));
    const all = found.length === rows.length ? "" : ` of ${number.format(rows.length)}`;
    shown.textContent = `${number.format(Math.min(count, found.length))} shown of ${number.format(found.length)} found${all}`;
    more.hidden = found.length <= count;
  };
  const refresh = () => {
    const words = find.value.toLowerCase().split(/\s+/).filter(Boolean);
    found = rows.filter((entry) => (!state.value || entry.state === state.value) &&
      (!base.value || entry.base === base.value) && words.every((word) => entry.text.includes(word)));
    if (column >= 0) {
      const keyed = found.map((entry) => [value(entry), entry]);
      keyed.sort((a, b) => compare(a[0], b[0]) || a[1].at - b[1].at);
      found = keyed.map((pair) => pair[1]);
    }
    count = PAGE;
    draw();
  };

  heads.forEach((head, at) => {
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = head.textContent;
    button.addEventListener("click", () => {
      falling = column === at ? !falling : false;
      column = at;
      heads.forEach((other) => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", falling ? "descending" : "ascending");
      refresh();
    });
    head.replaceChildren(button);
  });
  get("controls").addEventListener("submit", (event) => event.preventDefault());
  find.addEventListener("input", refresh);
  for (const choice of [state, base]) choice.addEventListener("change", refresh);
  get("next").addEventListener("click", () => { count += PAGE; draw(); });
  get("all").addEventListener("click", () => { count = Infinity; draw(); });
  get("controls").hidden = false;
  refresh();
})();
