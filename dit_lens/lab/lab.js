"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const at = (id) => document.getElementById(id);
const texts = ["prompt", "other", "action"], numbers = ["seed", "num_steps", "first", "last", "factor"];
const state = { prompt: data.prompt, other: data.other, seed: 0, num_steps: 14, action: "mask", heads: [], words: [], first: 0, last: 13, factor: 0 };
let shown = { tokens: [], attention: [] }, asked = 0;

function toggle(list, value) {
  const place = list.indexOf(value);
  if (place < 0) list.push(value); else list.splice(place, 1);
  change();
}

function button(text, small, pressed, press) {
  const node = document.createElement("button"), note = document.createElement("small");
  node.setAttribute("aria-pressed", pressed);
  note.textContent = small;
  node.append(text, note);
  node.onclick = press;
  return node;
}

// of a head: mean attention to the chosen words at the first step, without the edit
function attention(head) {
  const row = shown.attention[data.heads.indexOf(head)] ?? [];
  return shown.tokens.reduce((sum, [place], i) => sum + (!state.words.length || state.words.includes(place) ? row[i] : 0), 0);
}

function show() {
  for (const name of [...texts, ...numbers]) if (document.activeElement !== at(name)) at(name).value = state[name];
  at("for-exchange").hidden = state.action !== "exchange";
  at("for-scale").hidden = state.action !== "scale";
  at("words").replaceChildren(...shown.tokens.map(([place, token]) => button(token, "", state.words.includes(place), () => toggle(state.words, place))));
  const value = { place: () => 0, weights: (head) => Math.abs(data.cosines[head] ?? 0), attention }[at("sort").value];
  const order = [...data.heads].sort((a, b) => value(b) - value(a) || data.heads.indexOf(a) - data.heads.indexOf(b));
  at("heads").replaceChildren(...order.map((head) => {
    const note = at("sort").value === "attention" ? attention(head).toFixed(2) : data.cosines[head]?.toFixed(2) ?? "";
    return button(head, note, state.heads.includes(head), () => toggle(state.heads, head));
  }));
}

async function draw() {
  const number = ++asked;
  at("message").textContent = "drawing …";
  const answer = await fetch("/draw", {
    method: "POST",
    headers: { "Content-Type": "application/json", "X-Token": data.token },
    body: JSON.stringify(state),
  }).then((response) => response.json()).catch(() => ({ error: "The lab's server does not answer." }));
  if (number !== asked) return; // a later click has been drawn since
  at("message").textContent = answer.error ?? `${data.model}: ${state.heads.length} of ${data.heads.length} heads edited`;
  if (answer.error) { document.body.dataset.drawn = "error"; return; }
  shown = answer;
  at("original").src = answer.original;
  at("edited").src = answer.edited;
  at("snippet").textContent = answer.snippet;
  show();
  document.body.dataset.drawn = JSON.stringify(state);
}

let waiting = null;
function change() {
  state.last = Math.min(state.last, state.num_steps - 1);
  state.first = Math.min(state.first, state.last);
  history.replaceState(null, "", `#${encodeURIComponent(JSON.stringify(state))}`);
  show();
  clearTimeout(waiting);
  waiting = setTimeout(draw, 150);
}

// An address may come from anywhere: fields of another kind are not read, and the server checks all of them.
function read() {
  let given = {};
  try { given = JSON.parse(decodeURIComponent(location.hash.slice(1))); } catch { /* no state */ }
  for (const name of Object.keys(state))
    if (given && typeof given[name] === typeof state[name] && Array.isArray(given[name]) === Array.isArray(state[name])) state[name] = given[name];
}

for (const name of texts) at(name).onchange = (event) => {
  state[name] = event.target.value;
  if (name === "prompt") state.words = [];
  change();
};
for (const name of numbers) at(name).onchange = (event) => { state[name] = Number(event.target.value); change(); };
at("sort").onchange = show;
at("none").onclick = () => { state.heads = []; change(); };
at("copy").onclick = () => navigator.clipboard.writeText(at("snippet").textContent);
window.onhashchange = () => { read(); change(); };
read();
show();
if (state.prompt) draw();
