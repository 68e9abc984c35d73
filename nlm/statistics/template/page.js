"use strict";
// Reads values back from the heat maps: each colour is a level of the scale.
const facts = JSON.parse(document.getElementById("facts").textContent);
const codes = Object.fromEntries(Object.entries(facts.palettes).map(([kind, colours]) => [
  kind, new Map(colours.map(([red, green, blue], code) => [(red << 16) | (green << 8) | blue, code])),
]));

/** The edges of cell `i` of `parts` that `n` layers or steps are divided into, as in cells.py. */
const edges = (i, n, parts) => [Math.floor(i * n / parts), Math.floor((i + 1) * n / parts) - 1];
const span = (word, [first, last]) => first === last ? `${word} ${first}` : `${word}s ${first}–${last}`;

function words(code, { kind, low, high }) {
  if (code === facts.codes.absent) return "has none";
  if (code === facts.codes.notFinite) return "not finite";
  const level = (code - facts.codes.first) / (facts.codes.levels - 1);
  const value = kind === "log" ? low * (high / low) ** level : low + (high - low) * level;
  const size = Math.abs(value);
  return size !== 0 && (size < 1e-3 || size >= 1e5) ? value.toExponential(1) : String(Number(value.toPrecision(2)));
}

function pixels(image) {
  const canvas = document.createElement("canvas");
  canvas.width = image.naturalWidth;
  canvas.height = image.naturalHeight;
  const context = canvas.getContext("2d", { willReadFrequently: true });
  context.drawImage(image, 0, 0);
  return context.getImageData(0, 0, canvas.width, canvas.height).data;
}

for (const frame of document.querySelectorAll(".frame")) {
  const image = frame.querySelector("img");
  const cross = frame.querySelector(".cross");
  const readout = frame.closest("figure").querySelector(".readout");
  const data = frame.dataset;
  const [run, layers, rows, columns] = [data.run, data.layers, data.rows, data.columns].map(Number);
  const scale = { kind: data.kind, low: Number(data.low), high: Number(data.high) };
  const steps = facts.steps[run];
  let colours = null;
  let [row, column] = [0, columns - 1];

  function show() {
    colours ??= pixels(image);
    const at = 4 * ((rows - 1 - row) * columns + column);
    const code = codes[scale.kind].get((colours[at] << 16) | (colours[at + 1] << 8) | colours[at + 2]);
    const [first, last] = edges(column, steps.length, columns);
    const where = `${span("layer", edges(row, layers, rows))}, ${span("step", [steps[first], steps[last]])}`;
    readout.textContent = `${where}: ${code === undefined ? "this browser alters colours" : words(code, scale)}`;
    cross.hidden = false;
    cross.style.left = `${100 * (column + 0.5) / columns}%`;
    cross.style.top = `${100 * (rows - 0.5 - row) / rows}%`;
  }

  frame.addEventListener("pointermove", (event) => {
    const box = image.getBoundingClientRect();
    const cell = (share, n) => Math.min(n - 1, Math.max(0, Math.floor(share * n)));
    column = cell((event.clientX - box.left) / box.width, columns);
    row = rows - 1 - cell((event.clientY - box.top) / box.height, rows);
    show();
  });
  frame.addEventListener("pointerleave", () => {
    cross.hidden = true;
    readout.textContent = "";
  });
  frame.addEventListener("keydown", (event) => {
    const move = { ArrowUp: [1, 0], ArrowDown: [-1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] }[event.key];
    if (!move) return;
    event.preventDefault();
    const stride = event.shiftKey ? 10 : 1;
    row = Math.min(rows - 1, Math.max(0, row + stride * move[0]));
    column = Math.min(columns - 1, Math.max(0, column + stride * move[1]));
    show();
  });
  frame.addEventListener("focus", () => image.decode().then(show));
}
