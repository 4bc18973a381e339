"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const [rows, columns] = data.grid;
const places = rows * columns;
const at = (id) => document.getElementById(id);
const make = (tag, more = {}, ...children) => {
  const node = Object.assign(document.createElement(tag), more);
  node.append(...children);
  return node;
};
const state = { prompt: 0, beside: -1, head: 0, step: 0, word: 0, opacity: 65, sort: "place", place: null };
const weights = []; // of each entry: Uint8Array, 255·√p in the order step, head, place, word
const squares = Float32Array.from({ length: 256 }, (_, byte) => (byte / 255) ** 2);

async function unpack(text) {
  const packed = Uint8Array.from(atob(text), (character) => character.charCodeAt(0));
  const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("gzip"));
  return new Uint8Array(await new Response(stream).arrayBuffer());
}

function weight(entry, head, place, word, step = state.step) {
  const words = data.entries[entry].tokens.length;
  return squares[weights[entry][((step * data.heads.length + head) * places + place) * words + word]];
}

// The word of an entry beside the first one: the same token, else the same position.
function wordOf(entry) {
  if (entry === state.prompt) return state.word;
  const tokens = data.entries[entry].tokens;
  const same = tokens.indexOf(data.entries[state.prompt].tokens[state.word]);
  return same >= 0 ? same : Math.min(state.word, tokens.length - 1);
}

const ALL = -2; // of "beside": every other entry
const shown = () => [state.prompt, ...(state.beside === ALL ? data.entries.map((_, entry) => entry).filter((entry) => entry !== state.prompt)
  : state.beside >= 0 ? [state.beside] : [])];
const map = (entry, head, word) => Float32Array.from({ length: places }, (_, place) => weight(entry, head, place, word));
const average = (values) => values.reduce((sum, value) => sum + value, 0) / values.length;

const measures = {
  place: () => 0,
  mean: (head) => -average(map(state.prompt, head, state.word)),
  contrast: (head) => {
    const values = map(state.prompt, head, state.word), mean = average(values);
    return -Math.sqrt(average(values.map((value) => (value - mean) ** 2)));
  },
  entropy: (head) => {
    let total = 0;
    const words = data.entries[state.prompt].tokens.length;
    for (let place = 0; place < places; place++)
      for (let word = 0; word < words; word++) {
        const p = weight(state.prompt, head, place, word);
        if (p > 0) total -= p * Math.log2(p);
      }
    return total / places;
  },
};

// black → magenta → yellow
const colour = (x) => [Math.min(255, 400 * x), Math.max(0, 380 * (x - 0.35)), Math.max(0, 160 * Math.sin(Math.PI * Math.min(1, 1.35 * x)))];

function draw(canvas, values, top, opacity = 1) {
  canvas.width = columns;
  canvas.height = rows;
  const context = canvas.getContext("2d"), pixels = context.createImageData(columns, rows);
  values.forEach((value, place) => pixels.data.set([...colour(value / top), 255 * opacity], 4 * place));
  context.putImageData(pixels, 0, 0);
}

function panelOf(number) {
  let panel = document.querySelector(`[data-panel="${number}"]`);
  if (!panel) {
    panel = make("div", { className: "panel" });
    panel.dataset.panel = number;
    at("panels").append(panel);
  }
  return panel;
}

function showPanel(number, entry, top) {
  const panel = panelOf(number);
  const { text, tokens, image } = data.entries[entry];
  if (panel.dataset.entry !== String(entry)) {
    panel.dataset.entry = entry;
    const words = tokens.map((token, word) => make("button", {
      onclick: () => set(number ? { prompt: entry, beside: state.beside === ALL ? ALL : state.prompt, word } : { word }),
    }, token, make("small")));
    const canvas = make("canvas", { tabIndex: -1 });
    canvas.setAttribute("role", "img");
    canvas.onmousemove = (event) => {
      const box = canvas.getBoundingClientRect();
      const column = Math.min(columns - 1, Math.max(0, Math.floor((event.clientX - box.left) / box.width * columns)));
      const row = Math.min(rows - 1, Math.max(0, Math.floor((event.clientY - box.top) / box.height * rows)));
      if (row * columns + column !== state.place) { state.place = row * columns + column; show(); }
    };
    canvas.onmouseleave = () => { state.place = null; show(); };
    const picture = () => make("img", { src: image, alt: `generated image of: ${text}` });
    const list = make("div", { className: "words" }, ...words);
    list.setAttribute("role", "group");
    list.setAttribute("aria-label", `words of the prompt: ${text}`);
    panel.replaceChildren(list, make("div", { className: "pictures" },
      make("div", { className: "frame" }, picture()), make("div", { className: "frame" }, picture(), canvas)));
  }
  const chosen = wordOf(entry);
  panel.querySelectorAll(".words button").forEach((button, word) => {
    const value = state.place === null ? average(map(entry, state.head, word)) : weight(entry, state.head, state.place, word);
    button.setAttribute("aria-pressed", word === chosen);
    button.style.background = `rgba(181, 54, 122, ${0.6 * value})`;
    button.querySelector("small").textContent = value.toFixed(2);
  });
  const canvas = panel.querySelector("canvas");
  canvas.setAttribute("aria-label", `attention of ${data.heads[state.head]} to ${tokens[chosen]}`);
  draw(canvas, map(entry, state.head, chosen), top, state.opacity / 100);
  if (state.place !== null) {
    const context = canvas.getContext("2d");
    context.fillStyle = "#fff";
    context.fillRect(state.place % columns, Math.floor(state.place / columns), 1, 1);
  }
}

// heads × steps: red for positive, blue for negative, pale for none
function showEffects() {
  if (!data.effects) return;
  const { name, values } = data.effects, canvas = document.querySelector("#effects canvas");
  at("effects").hidden = false;
  const reach = Math.max(1e-12, ...values.flat().map((value) => Math.abs(value ?? 0)));
  canvas.width = data.steps.length;
  canvas.height = data.heads.length;
  canvas.style.height = `${Math.max(160, 7 * data.heads.length)}px`;
  const context = canvas.getContext("2d"), pixels = context.createImageData(canvas.width, canvas.height);
  values.flat().forEach((value, cell) => {
    const x = 255 * (1 - Math.abs(value ?? 0) / reach);
    pixels.data.set(value === null ? [0, 0, 0, 0] : value > 0 ? [255, x, x, 255] : [x, x, 255, 255], 4 * cell);
  });
  context.putImageData(pixels, 0, 0);
  context.fillStyle = "#000";
  context.fillRect(state.step + 0.35, state.head + 0.35, 0.3, 0.3);
  const here = values[state.head][state.step];
  showPatched();
  document.querySelector("#effects p").textContent =
    `${name} of ${data.heads[state.head]} at step ${data.steps[state.step]}: ${here === null ? "not known" : here.toPrecision(3)} (largest ${reach.toPrecision(3)}); heads down, steps to the right, click a cell`;
  canvas.setAttribute("aria-label", `${name} by head and step`);
  canvas.onclick = (event) => {
    const box = canvas.getBoundingClientRect();
    set({
      step: limit(Math.floor((event.clientX - box.left) / box.width * canvas.width), 0, canvas.width - 1),
      head: limit(Math.floor((event.clientY - box.top) / box.height * canvas.height), 0, canvas.height - 1),
    });
  };
}

// the image of a cell beside the same without the edit
function showPatched() {
  const row = state.prompt % data.rows, { image, text } = data.entries[row];
  const where = `${data.heads[state.head]} at step ${data.steps[state.step]}`;
  const patched = data.patched[`${data.heads[state.head]} ${data.steps[state.step]}`]?.[row];
  at("patched").hidden = !Object.keys(data.patched).length;
  const figure = (src, caption) => make("figure", {},
    src ? make("img", { src, alt: `${caption}: ${text}` }) : make("div", { className: "none" }), make("figcaption", { textContent: caption }));
  at("patched").replaceChildren(figure(image, "as it is"), figure(patched, patched ? `patched, ${where}` : `no image of ${where}`));
}

let layout = "";
function showHeads() {
  const order = data.heads.map((_, head) => head);
  const values = order.map(measures[state.sort]);
  order.sort((a, b) => values[a] - values[b] || a - b);
  const box = at("heads"), sorted = state.sort !== "place";
  if (layout !== String(order) + sorted) { // rebuilt when the order changes only: a press keeps its button
    layout = String(order) + sorted;
    const cell = (head) => {
      const button = make("button", { onclick: () => set({ head }), title: data.heads[head] }, make("canvas"));
      button.dataset.head = head;
      button.setAttribute("aria-label", data.heads[head]);
      if (sorted) button.append(make("span"));
      return button;
    };
    box.className = sorted ? "sorted" : "";
    if (sorted) box.replaceChildren(...order.map(cell));
    else {
      const name = (head) => data.heads[head].match(/^L(\d+)H(\d+)$/);
      const layers = [...new Set(order.map((head) => name(head)[1]))];
      const numbers = [...new Set(order.map((head) => Number(name(head)[2])))].sort((a, b) => a - b);
      const label = (text) => make("span", { textContent: text });
      box.style.gridTemplateColumns = `repeat(${numbers.length + 1}, auto)`;
      box.replaceChildren(label(""), ...numbers.map((number) => label(`H${number}`)), ...layers.flatMap((layer) => [
        label(`L${layer}`),
        ...numbers.map((number) => {
          const head = data.heads.indexOf(`L${layer}H${number}`);
          return head < 0 ? label("") : cell(head);
        }),
      ]));
    }
  }
  const maps = order.map((head) => map(state.prompt, head, state.word));
  const top = Math.max(1e-9, ...maps.map((values) => values.reduce((a, b) => Math.max(a, b))));
  for (const button of box.querySelectorAll("button")) {
    const head = Number(button.dataset.head);
    button.setAttribute("aria-pressed", head === state.head);
    draw(button.querySelector("canvas"), maps[order.indexOf(head)], top);
    if (sorted) button.querySelector("span").textContent = `${data.heads[head]} ${Math.abs(values[head]).toFixed(2)}`;
  }
}

function show() {
  const entries = shown(), { tokens } = data.entries[state.prompt], head = data.heads[state.head];
  const top = Math.max(1e-9, ...entries.map((entry) => map(entry, state.head, wordOf(entry)).reduce((a, b) => Math.max(a, b))));
  for (const name of ["prompt", "beside", "head", "step", "opacity", "sort"]) at(name).value = state[name];
  at("step-value").textContent = data.steps[state.step];
  at("opacity-value").textContent = `${state.opacity} %`;
  at("largest").textContent = top.toFixed(3);
  const value = state.place === null ? average(map(state.prompt, state.head, state.word)) : weight(state.prompt, state.head, state.place, state.word);
  const where = state.place === null ? "on average over all places" : `from row ${Math.floor(state.place / columns)}, column ${state.place % columns}`;
  at("readout").textContent = `${head}, step ${data.steps[state.step]}: “${tokens[state.word]}” gets ${value.toFixed(3)} of the attention ${where}`;
  entries.forEach((entry, number) => showPanel(number, entry, top));
  for (const panel of [...at("panels").children].slice(entries.length)) panel.remove();
  showHeads();
  showEffects();
}

const limit = (value, low, high) => Math.min(high, Math.max(low, value));

function set(changes) {
  Object.assign(state, changes);
  state.word = limit(state.word, 0, data.entries[state.prompt].tokens.length - 1);
  if (state.beside === state.prompt) state.beside = -1;
  const hash = new URLSearchParams({
    prompt: state.prompt, beside: state.beside, head: data.heads[state.head], step: data.steps[state.step],
    word: state.word, opacity: state.opacity, sort: state.sort,
  });
  try { history.replaceState(null, "", `#${hash}`); } catch { /* a frame of a notebook has no address */ }
  show();
}

// An address may come from anywhere: what it does not name correctly stays as it is.
function read(hash) {
  const given = new URLSearchParams(hash.replace(/^#/, "")), found = {};
  const number = (name, low, high) => {
    const value = Number(given.get(name) ?? NaN);
    if (Number.isInteger(value) && value >= low && value <= high) found[name] = value;
  };
  number("prompt", 0, data.entries.length - 1);
  number("beside", ALL, data.entries.length - 1);
  number("opacity", 0, 100);
  number("word", 0, data.entries[found.prompt ?? state.prompt].tokens.length - 1);
  if (data.heads.includes(given.get("head"))) found.head = data.heads.indexOf(given.get("head"));
  if (data.steps.map(String).includes(given.get("step"))) found.step = data.steps.map(String).indexOf(given.get("step"));
  if (Object.hasOwn(measures, given.get("sort") ?? "")) found.sort = given.get("sort");
  return found;
}

function save(name, href) {
  const link = make("a", { href, download: name });
  document.body.append(link);
  link.click();
  link.remove();
}
const fileName = (suffix) => `attention-${data.heads[state.head]}-step${data.steps[state.step]}.${suffix}`;

function table() { // of the first panel: a row a place, a column a word
  const { tokens } = data.entries[state.prompt];
  const quoted = (text) => `"${(/^[=+\-@]/.test(text) ? "'" : "") + text.replaceAll('"', '""')}"`; // no formula in a spreadsheet
  const lines = [["row", "column", ...tokens.map(quoted)].join(",")];
  for (let place = 0; place < places; place++)
    lines.push([Math.floor(place / columns), place % columns,
      ...tokens.map((_, word) => weight(state.prompt, state.head, place, word).toFixed(4))].join(","));
  return lines.join("\n") + "\n";
}

function picture() {
  const side = 384, high = Math.round(side * rows / columns), canvas = make("canvas", { width: 2 * side + 8, height: (high + 34) * shown().length });
  const context = canvas.getContext("2d");
  context.imageSmoothingEnabled = false;
  context.fillStyle = "#fff";
  context.fillRect(0, 0, canvas.width, canvas.height);
  context.font = "15px sans-serif";
  shown().forEach((entry, number) => {
    const panel = panelOf(number), y = number * (high + 34) + 28;
    context.fillStyle = "#222";
    context.fillText(`${data.heads[state.head]}, step ${data.steps[state.step]}, “${data.entries[entry].tokens[wordOf(entry)]}”: ${data.entries[entry].text}`, 4, y - 9, canvas.width - 8);
    for (const [x, node] of [[0, panel.querySelector("img")], [side + 8, panel.querySelector("img")], [side + 8, panel.querySelector("canvas")]])
      context.drawImage(node, x, y, side, high);
  });
  return canvas.toDataURL("image/png");
}

let timer = null;
function play() {
  timer = timer === null ? setInterval(() => set({ step: (state.step + 1) % data.steps.length }), 350) : void clearInterval(timer) ?? null;
  at("play").setAttribute("aria-pressed", timer !== null);
  at("play").textContent = timer === null ? "play" : "stop";
}

const keys = {
  ArrowLeft: () => ({ step: limit(state.step - 1, 0, data.steps.length - 1) }),
  ArrowRight: () => ({ step: limit(state.step + 1, 0, data.steps.length - 1) }),
  ArrowUp: () => ({ head: limit(state.head - 1, 0, data.heads.length - 1) }),
  ArrowDown: () => ({ head: limit(state.head + 1, 0, data.heads.length - 1) }),
  "[": () => ({ word: state.word - 1 }),
  "]": () => ({ word: state.word + 1 }),
};

async function begin() {
  weights.push(...await Promise.all(data.entries.map((entry) => unpack(entry.pattern))));
  document.documentElement.style.setProperty("--aspect", `${columns} / ${rows}`);
  at("about").textContent = data.about;
  data.entries.forEach((entry, index) => at("prompt").append(new Option(entry.label, index)));
  at("beside").append(new Option("nothing", -1), new Option("all others", ALL), ...data.entries.map((entry, index) => new Option(entry.label, index)));
  data.heads.forEach((name, index) => at("head").append(new Option(name, index)));
  at("step").max = data.steps.length - 1;
  for (const name of ["prompt", "beside", "head", "step", "opacity"]) at(name).oninput = (event) => set({ [name]: Number(event.target.value) });
  at("sort").oninput = (event) => set({ sort: event.target.value });
  at("play").onclick = play;
  at("csv").onclick = () => save(fileName("csv"), `data:text/csv;charset=utf-8,${encodeURIComponent(table())}`);
  at("png").onclick = () => save(fileName("png"), picture());
  document.onkeydown = (event) => {
    if (event.target.matches("input, select") || event.ctrlKey || event.metaKey || event.altKey) return;
    if (event.key === " " && !event.target.matches("button")) { event.preventDefault(); play(); }
    if (Object.hasOwn(keys, event.key)) { event.preventDefault(); set(keys[event.key]()); }
  };
  window.onhashchange = () => set(read(location.hash));
  const context = at("bar").getContext("2d"), pixels = context.createImageData(100, 1);
  for (let x = 0; x < 100; x++) pixels.data.set([...colour(x / 99), 255], 4 * x);
  context.putImageData(pixels, 0, 0);
  set({ ...read(data.start), ...read(location.hash) });
  document.body.dataset.ready = "true";
}
begin();
