"use strict";
// Sorts and filters the table of stacks, and saves plots. Without this script the page only lacks that.
(() => {
  const all = (selector, inside = document) => [...inside.querySelectorAll(selector)];

  for (const element of all("[data-scripted]")) element.hidden = false;

  // Sorting: rows without a figure stay last, whichever way the others go.
  for (const table of all("table[data-sorts]")) {
    const body = table.tBodies[0];
    const heads = all("thead th", table);
    const value = (row, n) => {
      const cell = row.cells[n];
      if (cell.dataset.value !== undefined) return cell.dataset.value === "" ? null : Number(cell.dataset.value);
      return cell.textContent.trim().replace(/\s+/g, " ");
    };
    heads.forEach((head, n) => {
      const button = head.querySelector("button");
      if (!button) return;
      button.addEventListener("click", () => {
        const up = head.getAttribute("aria-sort") !== "ascending";
        for (const other of heads) other.removeAttribute("aria-sort");
        head.setAttribute("aria-sort", up ? "ascending" : "descending");
        const keyed = [...body.rows].map((row) => [value(row, n), row]);
        keyed.sort(([a], [b]) => {
          if (a === null || b === null) return (a === null) - (b === null);
          const order = typeof a === "number" ? a - b : a.localeCompare(b, "en", { numeric: true });
          return up ? order : -order;
        });
        body.append(...keyed.map(([, row]) => row));
        const told = document.getElementById("sorted");
        if (told) told.textContent = `Sorted by ${button.textContent.trim()}, ${up ? "ascending" : "descending"}.`;
      });
    });
  }

  // Filtering: every word must stand somewhere in the row.
  const form = document.getElementById("filters");
  if (form) {
    const rows = all("#stacks-table tbody tr").map((row) => [row, row.textContent.toLowerCase()]);
    const choices = ["mode", "precision", "outcome"];
    const count = document.getElementById("count");
    const filter = () => {
      const words = form.elements.text.value.toLowerCase().split(/\s+/).filter(Boolean);
      const chosen = choices.map((name) => [name, form.elements[name].value]);
      let shown = 0;
      for (const [row, text] of rows) {
        const fits = chosen.every(([name, wanted]) => !wanted || row.dataset[name] === wanted);
        row.hidden = !(fits && words.every((word) => text.includes(word)));
        if (!row.hidden) shown += 1;
      }
      count.textContent = `${shown} of ${rows.length} rows`;
    };
    form.addEventListener("input", filter);
    form.addEventListener("reset", (event) => {
      // The fields would be emptied only after this, and the rows a moment later.
      event.preventDefault();
      form.elements.text.value = "";
      for (const name of choices) form.elements[name].value = "";
      filter();
    });
    form.addEventListener("submit", (event) => event.preventDefault());
    filter();
  }

  // Saving: the plot as it is seen, in the colours of the page.
  const drawn = (svg) => {
    const copy = svg.cloneNode(true);
    const [, , width, height] = svg.getAttribute("viewBox").split(/\s+/).map(Number);
    const style = getComputedStyle(document.body);
    copy.setAttribute("width", width);
    copy.setAttribute("height", height);
    copy.setAttribute("color", style.color);
    const paper = document.createElementNS("http://www.w3.org/2000/svg", "rect");
    paper.setAttribute("width", "100%");
    paper.setAttribute("height", "100%");
    paper.setAttribute("fill", style.backgroundColor);
    copy.insertBefore(paper, copy.querySelector("g"));
    return { text: new XMLSerializer().serializeToString(copy), width, height };
  };
  const save = (blob, name) => {
    const link = document.createElement("a");
    link.href = URL.createObjectURL(blob);
    link.download = name;
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 10000);
  };
  const saveImage = (text, width, height, name) => {
    const image = new Image();
    image.onload = () => {
      const canvas = document.createElement("canvas");
      [canvas.width, canvas.height] = [3 * width, 3 * height];
      canvas.getContext("2d").drawImage(image, 0, 0, canvas.width, canvas.height);
      canvas.toBlob((blob) => save(blob, name), "image/png");
    };
    image.src = "data:image/svg+xml;charset=utf-8," + encodeURIComponent(text);
  };
  for (const button of all("button[data-save]")) {
    button.addEventListener("click", () => {
      const svg = button.closest("figure").querySelector("svg");
      const { text, width, height } = drawn(svg);
      const name = `portnet-${button.dataset.name}.${button.dataset.save}`;
      if (button.dataset.save === "png") saveImage(text, width, height, name);
      else save(new Blob([text], { type: "image/svg+xml" }), name);
    });
  }

  // On paper, what can be opened is open.
  let closed = [];
  addEventListener("beforeprint", () => {
    closed = all("details.prints:not([open])");
    for (const element of closed) element.open = true;
  });
  addEventListener("afterprint", () => {
    for (const element of closed) element.open = false;
  });
})();
