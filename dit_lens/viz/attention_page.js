"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const bytes = data.prompts.map((p) => Uint8Array.from(atob(p.pattern), (c) => c.charCodeAt(0)));
const [rows, columns] = data.grid;
const state = { prompt: 0, layer: 0, head: 0, step: 0, word: 0, place: null };
const at = (id) => document.getElementById(id);

const before = data.heads.map((_, layer) => data.heads.slice(0, layer).flat().length); // heads stored before a layer's
const cells = data.heads.flat().length;

// layer and head are indices of those on the page; stored as 255·√p, in the order step, layer and head, place, word
function weight(layer, head, place, word) {
  const words = data.prompts[state.prompt].tokens.length;
  const index = ((state.step * cells + before[layer] + head) * rows * columns + place) * words + word;
  return (bytes[state.prompt][index] / 255) ** 2;
}

function largest(places) {
  let found = 1e-9;
  for (const [layer, head] of places)
    for (let place = 0; place < rows * columns; place++) found = Math.max(found, weight(layer, head, place, state.word));
  return found;
}

// black → magenta → yellow; opacity follows the weight where a picture lies beneath
function colour(x) {
  return [Math.min(255, 400 * x), Math.max(0, 380 * (x - 0.35)), Math.max(0, 160 * Math.sin(Math.PI * Math.min(1, 1.35 * x)))];
}

function draw(canvas, layer, head, top, overlay) {
  canvas.width = columns;
  canvas.height = rows;
  const context = canvas.getContext("2d");
  const pixels = context.createImageData(columns, rows);
  for (let place = 0; place < rows * columns; place++) {
    const x = weight(layer, head, place, state.word) / top;
    pixels.data.set([...colour(x), overlay ? 255 * (0.15 + 0.6 * x) : 255], 4 * place);
  }
  context.putImageData(pixels, 0, 0);
  if (overlay && state.place !== null) {
    context.fillStyle = "#fff";
    context.fillRect(state.place % columns, Math.floor(state.place / columns), 1, 1);
  }
}

function mean(word) {
  let total = 0;
  for (let place = 0; place < rows * columns; place++) total += weight(state.layer, state.head, place, word);
  return total / (rows * columns);
}

function show() {
  const prompt = data.prompts[state.prompt];
  at("layer-value").textContent = data.layers[state.layer];
  const head = data.heads[state.layer][state.head];
  at("head-value").textContent = head;
  at("head").max = data.heads[state.layer].length - 1;
  at("step-value").textContent = data.steps[state.step];
  for (const name of ["layer", "head", "step"]) at(name).value = state[name];
  const values = prompt.tokens.map((_, word) => state.place === null ? mean(word) : weight(state.layer, state.head, state.place, word));
  [...at("words").children].forEach((button, word) => {
    button.setAttribute("aria-pressed", word === state.word);
    button.style.background = `rgba(181, 54, 122, ${0.75 * values[word]})`;
    button.querySelector("small").textContent = values[word].toFixed(2);
  });
  const where = state.place === null ? "on average over all places" : `from row ${Math.floor(state.place / columns)}, column ${state.place % columns}`;
  at("readout").textContent =
    `L${data.layers[state.layer]}H${head}, step ${data.steps[state.step]}: “${prompt.tokens[state.word]}” gets ${values[state.word].toFixed(3)} of the attention ${where}`;
  const top = largest([[state.layer, state.head]]);
  at("brightest").textContent = top.toFixed(3);
  draw(at("map"), state.layer, state.head, top, true);
  const every = largest(data.heads.flatMap((some, layer) => some.map((_, head) => [layer, head])));
  for (const canvas of at("heads").querySelectorAll("canvas")) {
    const [layer, head] = [Number(canvas.dataset.layer), Number(canvas.dataset.head)];
    canvas.setAttribute("aria-pressed", layer === state.layer && head === state.head);
    draw(canvas, layer, head, every, false);
  }
}

function choosePrompt(index) {
  state.prompt = index;
  const prompt = data.prompts[index];
  state.word = Math.min(state.word, prompt.tokens.length - 1);
  at("picture").src = prompt.image;
  at("words").replaceChildren(...prompt.tokens.map((token, word) => {
    const button = document.createElement("button");
    button.append(token, document.createElement("small"));
    button.onclick = () => { state.word = word; show(); };
    return button;
  }));
  show();
}

data.prompts.forEach((prompt, index) => at("prompt").append(new Option(prompt.text, index)));
at("prompt").onchange = (event) => choosePrompt(Number(event.target.value));
at("layer").max = data.layers.length - 1;
at("step").max = data.steps.length - 1;
for (const name of ["layer", "head", "step"]) at(name).oninput = (event) => {
  state[name] = Number(event.target.value);
  state.head = Math.min(state.head, data.heads[state.layer].length - 1);
  show();
};
at("map").onmousemove = (event) => {
  const box = event.target.getBoundingClientRect();
  const column = Math.min(columns - 1, Math.floor((event.clientX - box.left) / box.width * columns));
  const row = Math.min(rows - 1, Math.floor((event.clientY - box.top) / box.height * rows));
  const place = row * columns + column;
  if (place !== state.place) { state.place = place; show(); }
};
at("map").onmouseleave = () => { state.place = null; show(); };
at("image").style.setProperty("--aspect", `${columns} / ${rows}`);
const numbers = [...new Set(data.heads.flat())].sort((a, b) => a - b);
const label = (text) => Object.assign(document.createElement("span"), { textContent: text });
at("heads").style.gridTemplateColumns = `auto repeat(${numbers.length}, auto)`;
at("heads").append(label(""), ...numbers.map((number) => label(`H${number}`)));
data.layers.forEach((name, layer) => {
  at("heads").append(label(`L${name}`));
  for (const number of numbers) {
    const head = data.heads[layer].indexOf(number);
    if (head < 0) { at("heads").append(label("")); continue; }
    const canvas = document.createElement("canvas");
    Object.assign(canvas.dataset, { layer, head });
    canvas.onclick = () => { Object.assign(state, { layer, head }); show(); };
    at("heads").append(canvas);
  }
});
choosePrompt(0);
