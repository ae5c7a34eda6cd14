"use strict";
// A click on a head sorts the table's rows by that column: from the highest, from the lowest, as the study has them.

function makeSortable(table) {
  const body = table.tBodies[0];
  const given = [...body.rows];
  const heads = [...table.tHead.rows[0].cells];
  const directions = ["descending", "ascending", "none"];

  function sortBy(column) {
    const now = heads[column].getAttribute("aria-sort");
    const direction = column === 0 ? "none" : directions[(directions.indexOf(now) + 1) % directions.length];
    heads.forEach((head, index) => head.setAttribute("aria-sort", index === column ? direction : "none"));
    body.append(...(direction === "none" ? given : sorted(column, direction === "descending" ? -1 : 1)));
  }

  // Rows without a value come last either way; rows with the same one stay in the given order.
  function sorted(column, sign) {
    const value = (row) => row.cells[column].dataset.value;
    const known = given.filter((row) => value(row) !== "");
    known.sort((a, b) => sign * (Number(value(a)) - Number(value(b))));
    return [...known, ...given.filter((row) => value(row) === "")];
  }

  heads.forEach((head, column) => head.querySelector("button").addEventListener("click", () => sortBy(column)));
}
