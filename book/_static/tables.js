// Tables of the class "sortable": a click on a heading sorts, a field above filters the rows.
function numberIn(text) {
  const found = text.replace("−", "-").match(/^[+-]?[\d,]+(\.\d+)?/);
  return found ? parseFloat(found[0].replaceAll(",", "")) : NaN;
}

function makeSortable(table) {
  const body = table.tBodies[0];
  const rows = [...body.rows];
  const field = document.createElement("input");
  field.type = "search";
  field.placeholder = "filter: v2 inpainting GLOW";
  field.setAttribute("aria-label", "Show the rows that hold these words");
  field.className = "table-filter";
  field.addEventListener("input", () => {
    const words = field.value.toLowerCase().split(/\s+/);
    for (const row of rows) {
      const text = row.textContent.toLowerCase();
      row.hidden = !words.every((word) => text.includes(word));
    }
  });
  (table.closest(".pst-scrollable-table-container") ?? table).before(field);
  [...table.tHead.rows[0].cells].forEach((heading, column) => {
    const button = document.createElement("button");
    button.textContent = heading.textContent;
    heading.replaceChildren(button);
    button.addEventListener("click", () => {
      const down = heading.getAttribute("aria-sort") === "ascending";
      for (const cell of table.tHead.rows[0].cells) cell.removeAttribute("aria-sort");
      heading.setAttribute("aria-sort", down ? "descending" : "ascending");
      const text = (row) => row.cells[column].textContent;
      rows.sort((a, b) => {
        const difference = numberIn(text(a)) - numberIn(text(b));
        const order = Number.isNaN(difference) ? text(a).localeCompare(text(b)) : difference;
        return down ? -order : order;
      });
      body.append(...rows);
    });
  });
}

document.addEventListener("DOMContentLoaded", () => document.querySelectorAll("table.sortable").forEach(makeSortable));
