"use strict";
// Sorts, filters and pages each table. The cells are in the page as JSON, a list for each column. Text reaches
// the document as text alone.
const ROWS = 100;

// A line may end after each dot of a name.
function write(cell, text) {
  text.split(".").forEach((part, at, parts) => {
    cell.append(at + 1 < parts.length ? `${part}.` : part);
    if (at + 1 < parts.length) cell.append(document.createElement("wbr"));
  });
}

function start(figure) {
  const data = JSON.parse(figure.querySelector("script").textContent);
  const body = figure.querySelector("tbody");
  const heads = [...figure.querySelectorAll("thead th")];
  const [filter, back, on] = ["input", ".back", ".on"].map((one) => figure.querySelector(one));
  const status = figure.querySelector("output");
  const count = data[0].cells.length;
  const state = { column: -1, descending: false, page: 0, order: [...Array(count).keys()] };
  let words = null;

  function text(row) {
    return data.filter((one) => !one.keys).map((one) => one.cells[row]).join("\n").toLowerCase();
  }

  function arrange() {
    const wanted = filter.value.trim().toLowerCase().split(/\s+/).filter(Boolean);
    let rows = [...Array(count).keys()];
    if (wanted.length) {
      words = words || rows.map(text);
      rows = rows.filter((row) => wanted.every((word) => words[row].includes(word)));
    }
    if (state.column >= 0) {
      const { cells, keys } = data[state.column];
      const sign = state.descending ? -1 : 1;
      const names = new Intl.Collator(undefined, { numeric: true });
      rows.sort((a, b) => {
        if (!keys) return sign * names.compare(cells[a], cells[b]) || a - b;
        if (keys[a] === null || keys[b] === null) return (keys[a] === null) - (keys[b] === null) || a - b;
        return sign * (keys[a] - keys[b]) || a - b;
      });
    }
    state.order = rows;
    state.page = 0;
    show();
  }

  function show() {
    const first = state.page * ROWS;
    const rows = state.order.slice(first, first + ROWS);
    body.replaceChildren(...rows.map((row) => {
      const line = document.createElement("tr");
      data.forEach((one, at) => {
        const cell = line.insertCell();
        if (at) cell.textContent = one.cells[row];
        else write(cell, one.cells[row]);
        cell.className = one.keys ? "number" : at ? "" : "wrap";
      });
      return line;
    }));
    const all = state.order.length.toLocaleString("en");
    const last = first + rows.length;
    status.textContent = rows.length
      ? `${(first + 1).toLocaleString("en")} to ${last.toLocaleString("en")} of ${all}`
      : "no row has this text";
    back.disabled = !first;
    on.disabled = last >= state.order.length;
    figure.querySelector(".scroll").scrollTop = 0;
  }

  function turn(by) {
    state.page += by;
    show();
    // A button that is switched off loses the focus: the other one takes it.
    if (by > 0 && on.disabled) back.focus();
    if (by < 0 && back.disabled) on.focus();
  }

  heads.forEach((head, at) => {
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = head.textContent;
    head.replaceChildren(button);
    head.setAttribute("aria-sort", "none");
    button.addEventListener("click", () => {
      // Numbers begin with the largest.
      state.descending = state.column === at ? !state.descending : Boolean(data[at].keys);
      state.column = at;
      heads.forEach((one) => one.setAttribute("aria-sort", "none"));
      head.setAttribute("aria-sort", state.descending ? "descending" : "ascending");
      arrange();
    });
  });
  filter.addEventListener("input", arrange);
  back.addEventListener("click", () => turn(-1));
  on.addEventListener("click", () => turn(1));
  figure.querySelector(".controls").hidden = count <= 10;
  figure.querySelector(".bare").hidden = true;
  back.hidden = on.hidden = count <= ROWS;
  show();
}

document.querySelectorAll("figure.table").forEach(start);
