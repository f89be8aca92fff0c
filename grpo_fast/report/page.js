"use strict";
// Pointing at one chart shows the figures of that step in all of them.
const charts = document.querySelector(".charts");
if (charts) {
  const steps = JSON.parse(charts.dataset.steps);
  const [left, right, width] = ["left", "right", "width"].map((name) => Number(charts.dataset[name]));
  const first = steps[0], span = Math.max(steps[steps.length - 1], first + 1) - first;
  const figures = [...charts.querySelectorAll(".chart")].map((chart) => {
    const output = chart.querySelector("output");
    return { output, last: output.textContent, cursor: chart.querySelector(".cursor"), values: JSON.parse(chart.dataset.values) };
  });
  const read = (event) => {
    const svg = event.target.closest("svg");
    if (!svg) return;
    const box = svg.getBoundingClientRect();
    const at = first + (((event.clientX - box.left) / box.width) * width - left) / (right - left) * span;
    let index = 0;
    steps.forEach((step, i) => { if (Math.abs(step - at) < Math.abs(steps[index] - at)) index = i; });
    const x = left + (steps[index] - first) / span * (right - left);
    charts.classList.add("reading");
    for (const { output, cursor, values } of figures) {
      output.textContent = `step ${Math.round(steps[index])}: ${values[index] ?? "n/a"}`;
      cursor.setAttribute("transform", `translate(${x})`);
    }
  };
  charts.addEventListener("pointermove", read);
  charts.addEventListener("pointerdown", read);
  charts.addEventListener("pointerleave", () => {
    charts.classList.remove("reading");
    for (const { output, last } of figures) output.textContent = last;
  });
}
