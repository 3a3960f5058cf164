"use strict";
(() => {
  const tip = document.getElementById("tip");
  const show = (words, x, y) => {
    tip.textContent = words;
    tip.style.visibility = "visible";
    const box = tip.getBoundingClientRect();
    const right = document.documentElement.clientWidth - box.width - 8;
    tip.style.left = Math.max(8, Math.min(x + 14, right)) + "px";
    tip.style.top = (y - box.height - 12 > 4 ? y - box.height - 12 : y + 18) + "px";
  };
  const hide = () => { tip.style.visibility = "hidden"; };

  for (const dot of document.querySelectorAll("[data-tip]")) {
    dot.addEventListener("pointerenter", (event) => show(dot.dataset.tip, event.clientX, event.clientY));
    dot.addEventListener("pointerleave", hide);
  }
  addEventListener("scroll", hide, { passive: true });

  // Tables: a button in a header sorts by its column; a second press turns the order around.
  const keyOf = (row, column) => row.cells[column].dataset.key ?? row.cells[column].textContent.trim();
  const sortTable = (table, column, order) => {
    const body = table.tBodies[0];
    const rows = [...body.rows];
    const numeric = table.tHead.rows[0].cells[column].dataset.kind === "number";
    const sign = order === "ascending" ? 1 : -1;
    rows.sort((one, other) => {
      const [a, b] = [keyOf(one, column), keyOf(other, column)];
      if (!numeric) return sign * a.localeCompare(b, undefined, { numeric: true });
      if (a === "" || b === "") return (a === "") - (b === "");  // what isn't known comes last
      return sign * (Number(a) - Number(b));
    });
    body.append(...rows);
    for (const head of table.tHead.rows[0].cells) {
      if (head.hasAttribute("aria-sort")) head.setAttribute("aria-sort", "none");
    }
    table.tHead.rows[0].cells[column].setAttribute("aria-sort", order);
  };
  for (const table of document.querySelectorAll("table.sortable")) {
    for (const button of table.tHead.querySelectorAll("button")) {
      button.addEventListener("click", () => {
        const head = button.closest("th");
        const first = head.dataset.kind === "number" && !head.dataset.upwards ? "descending" : "ascending";
        const other = first === "ascending" ? "descending" : "ascending";
        sortTable(table, head.cellIndex, head.getAttribute("aria-sort") === first ? other : first);
      });
    }
  }

  // The confusion matrix: cells are found by where the pointer is, so that empty ones answer, too.
  for (const matrix of document.querySelectorAll("svg.matrix")) {
    const side = Number(matrix.dataset.side);
    const left = Number(matrix.dataset.left);
    const top = Number(matrix.dataset.top);
    const classes = JSON.parse(document.getElementById(matrix.dataset.classes).textContent);
    const counts = new Map();
    const cells = [...matrix.querySelectorAll(".cells rect")].map((rect) => {
      const [row, column, count] = rect.dataset.cell.split(" ").map(Number);
      counts.set(row * classes.length + column, count);
      return { rect, row, column };
    });
    const texts = [...matrix.querySelectorAll("text[data-cell]")].map((text) => {
      const [row, column] = text.dataset.cell.split(" ").map(Number);
      return { text, row, column };
    });
    const here = matrix.querySelector(".here");
    const readout = document.getElementById(matrix.dataset.readout);
    let order = classes.map((_, k) => k);  // place -> class
    let at = [0, 0];

    const move = (element, x, y) => {
      element.setAttribute("x", x);
      element.setAttribute("y", y);
    };
    const arrange = () => {
      const places = [];
      order.forEach((k, place) => { places[k] = place; });
      const middle = (k) => (places[k] + 0.5) * side;
      for (const { rect, row, column } of cells) move(rect, places[column] * side, places[row] * side);
      for (const { text, row, column } of texts) move(text, middle(column), middle(row));
      for (const name of matrix.querySelectorAll(".rows text")) name.setAttribute("y", middle(name.dataset.class));
      for (const name of matrix.querySelectorAll(".columns text")) {
        if (name.parentNode.classList.contains("level")) name.setAttribute("x", middle(name.dataset.class));
        else name.setAttribute("transform", `translate(${middle(name.dataset.class)} -6) rotate(-90)`);
      }
      here.style.visibility = "hidden";
      at = [0, 0];
    };
    const words = (row, column) => {
      const [from, to] = [classes[order[row]], classes[order[column]]];
      const count = counts.get(order[row] * classes.length + order[column]) ?? 0;
      const share = from.images ? ` (${(100 * count / from.images).toFixed(1)} %)` : "";
      const verb = row === column ? "recognised" : `taken for ${to.name}`;
      return `${from.name}: ${count} of ${from.images} images${share} ${verb}`;
    };
    const point = (row, column) => {
      at = [row, column];
      move(here, column * side, row * side);
      here.style.visibility = "visible";
      readout.textContent = words(row, column);
    };
    const cellUnder = (event) => {
      const place = new DOMPoint(event.clientX, event.clientY).matrixTransform(matrix.getScreenCTM().inverse());
      const cell = [Math.floor((place.y - top) / side), Math.floor((place.x - left) / side)];
      return cell.every((k) => k >= 0 && k < classes.length) ? cell : null;
    };
    const follow = (event) => {
      const cell = cellUnder(event);
      if (!cell) { hide(); return; }
      point(...cell);
      show(words(...cell), event.clientX, event.clientY);
    };
    matrix.addEventListener("pointermove", follow);
    matrix.addEventListener("pointerdown", follow);
    matrix.addEventListener("pointerleave", hide);
    matrix.addEventListener("keydown", (event) => {
      const step = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] }[event.key];
      if (!step) return;
      event.preventDefault();
      const shown = here.style.visibility === "visible";
      const within = (k) => Math.max(0, Math.min(classes.length - 1, k));
      point(...(shown ? at.map((k, axis) => within(k + step[axis])) : at));
    });

    const error = (k) => (classes[k].images ? 1 - classes[k].right / classes[k].images : -1);
    const ways = {
      model: (a, b) => a - b,
      name: (a, b) => classes[a].name.localeCompare(classes[b].name, undefined, { numeric: true }),
      images: (a, b) => classes[b].images - classes[a].images || a - b,
      error: (a, b) => error(b) - error(a) || a - b,
    };
    const choice = document.getElementById(matrix.dataset.choice);
    choice.addEventListener("change", () => {
      order = classes.map((_, k) => k).sort(ways[choice.value]);
      arrange();
    });
  }

  addEventListener("beforeprint", () => {
    for (const fold of document.querySelectorAll("details")) fold.open = true;
  });
})();
