"use strict";
// Without this script the page is complete: every mask is shown, one below the other.
document.documentElement.classList.add("js");
document.addEventListener("DOMContentLoaded", () => {
  const chooser = document.getElementById("layer");
  const show = () => {
    for (const mask of document.querySelectorAll(".mask")) {
      const chosen = mask.id === chooser.value;
      mask.classList.toggle("chosen", chosen);
      for (const chart of document.querySelectorAll(".layers")) {
        chart.children[mask.dataset.of].classList.toggle("chosen", chosen);
      }
    }
  };
  if (chooser) {
    chooser.addEventListener("input", show);
    document.addEventListener("click", (event) => {
      const column = event.target.closest(".layers > g");
      const place = column && [...column.parentNode.children].indexOf(column);
      const mask = column && document.querySelector(`.mask[data-of="${place}"]`);
      if (mask) {
        chooser.value = mask.id;
        show();
      }
    });
    show();
  }
  const tables = [...document.querySelectorAll("details")];
  let opened = [];
  window.addEventListener("beforeprint", () => {
    opened = tables.filter((table) => !table.open);
    opened.forEach((table) => { table.open = true; });
  });
  window.addEventListener("afterprint", () => opened.forEach((table) => { table.open = false; }));
});
