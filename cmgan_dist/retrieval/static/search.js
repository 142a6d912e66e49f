// The search page. Its state is the address: ?text= or ?picture= or ?similar=, with modality and classes; without one
// of the three it browses. Captions, keys and class names are hostile: they become text by textContent, never markup.
"use strict";

const byId = (id) => document.getElementById(id);
const box = byId("text");
const results = byId("results");
const chance = Number(document.body.dataset.chance);
const uploadBytes = Number(document.body.dataset.uploadBytes);
const LIMIT = 60; // items of a page when browsing
const HITS = 24; // of each modality in a search

let running = null; // AbortController of the request under way
let shown = 0; // items shown when browsing

// ---------------------------------------------------------------------------------------------- state and address

function readState() {
  const query = new URLSearchParams(location.search);
  const modality = query.get("modality");
  return {
    text: query.get("text") || "",
    picture: query.get("picture") || "",
    similar: query.get("similar") || "",
    modality: modality === "image" || modality === "text" ? modality : "",
    classes: query.getAll("classes"),
  };
}

function address(state) {
  const query = new URLSearchParams();
  for (const name of ["text", "picture", "similar", "modality"]) if (state[name]) query.set(name, state[name]);
  for (const name of state.classes) query.append("classes", name);
  return query.size ? `/?${query}` : "/";
}

function go(state) {
  const target = address(state);
  if (target !== location.pathname + location.search) history.pushState(null, "", target);
  show();
}

const filters = () => {
  const { modality, classes } = readState();
  return { text: "", picture: "", similar: "", modality, classes };
};

// ---------------------------------------------------------------------------------------------- requests

async function ask(path, parameters, options = {}) {
  const query = new URLSearchParams();
  for (const [name, value] of Object.entries(parameters)) {
    for (const one of Array.isArray(value) ? value : [value]) query.append(name, one);
  }
  let answer;
  try {
    answer = await fetch(`${path}?${query}`, options);
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Error("The server does not answer. Is it still running?");
  }
  const record = await answer.json().catch(() => ({}));
  if (!answer.ok) throw new Error(record.error || `The server answered ${answer.status}.`);
  return record;
}

function begin() {
  if (running) running.abort();
  running = new AbortController();
  results.setAttribute("aria-busy", "true");
  return running;
}

function end(mine) {
  if (running !== mine) return;
  results.classList.remove("busy", "waiting");
  results.removeAttribute("aria-busy");
}

const wanted = (state) => ({ k: HITS, modality: state.modality || "each", classes: state.classes });

function request(state, signal) {
  if (state.text) return ask("/api/search", { ...wanted(state), text: state.text }, { signal });
  if (state.picture) return ask("/api/search", { ...wanted(state), picture: state.picture }, { signal });
  if (state.similar) return ask(`/api/similar/${encodeURIComponent(state.similar)}`, wanted(state), { signal });
  return browse(state, 0, signal);
}

function browse(state, offset, signal) {
  const modality = state.modality || (document.body.dataset.images > 0 ? "image" : "text");
  return ask("/api/browse", { offset, limit: LIMIT, modality, classes: state.classes }, { signal });
}

async function show() {
  const state = readState();
  const mine = begin();
  showControls(state);
  const late = setTimeout(() => showWaiting(), 120);
  try {
    const answer = await request(state, mine.signal);
    showAnswer(state, answer);
  } catch (error) {
    if (error.name === "AbortError") return;
    showError(error.message);
  } finally {
    clearTimeout(late);
    end(mine);
  }
}

async function more() {
  const state = readState();
  const mine = begin();
  byId("more").disabled = true;
  try {
    const answer = await browse(state, shown, mine.signal);
    const first = addHits(answer.hits);
    showMore(answer);
    if (first) first.focus();
  } catch (error) {
    if (error.name !== "AbortError") notice("error", "That did not work.", error.message);
  } finally {
    end(mine);
    byId("more").disabled = false;
  }
}

async function searchPicture(file) {
  if (!file) return;
  if (!/^image\//.test(file.type)) return notice("error", "This is no picture.", "Give a JPEG, PNG or WebP file.");
  if (file.size > uploadBytes) {
    return notice("error", "This picture is too large.", `Give one of at most ${Math.floor(uploadBytes / 1048576)} MB.`);
  }
  const mine = begin();
  const state = filters();
  showControls({ ...state, picture: "new" });
  showWaiting();
  const form = new FormData();
  form.append("image", file, "image");
  try {
    const answer = await ask("/api/search", wanted(state), { method: "POST", body: form, signal: mine.signal });
    state.picture = answer.query.picture;
    if (address(state) !== location.pathname + location.search) history.pushState(null, "", address(state));
    showControls(state);
    showAnswer(state, answer);
  } catch (error) {
    if (error.name === "AbortError") return;
    await show(); // what was there before stays
    notice("error", "That did not work.", error.message);
  } finally {
    end(mine);
  }
}

// ---------------------------------------------------------------------------------------------- what is seen

function make(tag, name, text) {
  const element = document.createElement(tag);
  if (name) element.className = name;
  if (text !== undefined) element.textContent = text;
  return element;
}

function showControls(state) {
  if (box.value.trim() !== state.text) box.value = state.text;
  for (const radio of document.querySelectorAll("input[name=modality]")) radio.checked = radio.value === state.modality;
  for (const check of document.querySelectorAll("input[name=class]")) check.checked = state.classes.includes(check.value);
  const menu = byId("classes");
  if (menu) {
    menu.classList.toggle("chosen", state.classes.length > 0);
    const { length } = state.classes;
    byId("classes-label").textContent = length === 0 ? "All classes" : length === 1 ? state.classes[0] : `${length} classes`;
  }
}

function showQuery(state, query) {
  const image = byId("query-picture");
  byId("query").hidden = !(state.picture || state.similar);
  if (byId("query").hidden) return;
  const item = query.item;
  const source = item ? item.picture !== null && `/api/thumbnail/${item.picture}` : `/api/picture/${query.picture}`;
  image.hidden = !source;
  if (source) image.src = source;
  byId("query-kind").textContent = item ? `More like this ${item.modality === "image" ? "picture" : "text"}` : "Searching with";
  byId("query-name").textContent = item ? nameOf(item) : "your picture";
}

const nameOf = (hit) => hit.texts[0] || hit.key;

function distance(sd) {
  return `${Math.abs(sd).toFixed(1)} sd ${sd < 0 ? "below" : "above"} chance`;
}

function scoreOf(hit) {
  const line = make("span", "score");
  const bar = make("i");
  const sd = hit.above_chance;
  line.append(bar, sd === null ? `score ${hit.score.toFixed(2)}` : distance(sd));
  line.title = `score ${hit.score.toFixed(3)}`;
  line.classList.toggle("low", sd !== null && sd < 2);
  const share = (hit.score - chance) / (1 - chance); // from chance to the same
  bar.style.setProperty("--share", `${Math.max(0, Math.min(1, share)) * 100}%`);
  return line;
}

function pictureOf(hit) {
  if (hit.picture === null) return hit.modality === "image" ? make("span", "none", hit.key) : null;
  const image = make("img");
  image.loading = "lazy";
  image.decoding = "async";
  image.alt = "";
  image.addEventListener("error", () => image.replaceWith(make("span", "none", hit.key)), { once: true });
  image.src = `/api/thumbnail/${hit.picture}`;
  return image;
}

function cardOf(hit) {
  const card = make("a", "card");
  card.href = address({ ...filters(), similar: String(hit.id) });
  card.dataset.id = hit.id;
  card.title = nameOf(hit);
  const about = make("span", "about");
  about.append(make("span", "what", nameOf(hit)));
  if (hit.labels.length) about.append(make("span", "labels", hit.labels.join(", ")));
  if (hit.score !== undefined) about.append(scoreOf(hit));
  about.append(make("span", "like", "More like this"));
  const picture = pictureOf(hit);
  if (picture) card.append(picture);
  card.append(about);
  const entry = make("li");
  entry.append(card);
  return entry;
}

function addHits(hits) {
  let first = null;
  for (const [id, modality] of [["pictures", "image"], ["texts", "text"]]) {
    const mine = hits.filter((hit) => hit.modality === modality).map((hit) => cardOf(hit));
    byId(id).querySelector("ul").append(...mine);
    byId(id).hidden = !byId(id).querySelector("li");
    if (mine.length && !first) first = mine[0].firstChild;
  }
  shown += hits.length;
  return first;
}

function clearHits() {
  shown = 0;
  for (const id of ["pictures", "texts"]) {
    byId(id).querySelector("ul").replaceChildren();
    byId(id).hidden = true;
  }
  byId("more").hidden = true;
}

function count(hits, modality, one, many) {
  const number = hits.filter((hit) => hit.modality === modality).length;
  return number ? [`${number} ${number === 1 ? one : many}`] : [];
}

function showMore(answer) {
  byId("more").hidden = shown >= answer.total;
  const what = document.body.dataset.images > 0 && readState().modality !== "text" ? "pictures" : "texts";
  byId("status").textContent = `${shown.toLocaleString("en")} of ${answer.total.toLocaleString("en")} ${what}`;
}

function showAnswer(state, answer) {
  clearHits();
  notice("");
  showQuery(state, answer.query || {});
  addHits(answer.hits);
  const asked = state.text || state.picture || state.similar;
  document.title = [state.text, byId("home").textContent].filter(Boolean).join(" – ");
  if (!asked) showMore(answer);
  else byId("status").textContent = [...count(answer.hits, "image", "picture", "pictures"), ...count(answer.hits, "text", "text", "texts")].join(", ");
  if (!answer.hits.length) {
    notice("", "Nothing fits.", state.classes.length || state.modality ? "Choose other classes, or all of them." : "There is nothing in this index.");
    if (asked) byId("status").textContent = "No results";
  } else if (asked && !answer.near) {
    const best = Math.max(...answer.hits.map((hit) => hit.above_chance));
    notice("far", "Nothing is near.", `The best of these is ${distance(best)}; most of what is here has nearer neighbours. Try other words or another picture.`);
  }
  window.scrollTo(0, 0);
}

function showWaiting() {
  notice("");
  byId("status").textContent = "Searching…";
  if (results.querySelector(".card")) return results.classList.add("busy");
  results.classList.add("waiting");
  byId("pictures").hidden = false;
  byId("pictures").querySelector("ul").replaceChildren(...Array.from({ length: 12 }, () => {
    const entry = make("li");
    const card = make("span", "card");
    const about = make("span", "about");
    about.append(make("span", "bone line"), make("span", "bone line short"));
    card.append(make("span", "bone square"), about);
    entry.append(card);
    return entry;
  }));
  return undefined;
}

function showError(message) {
  clearHits();
  byId("query").hidden = true;
  byId("status").textContent = "";
  notice("error", "That did not work.", message);
  byId("again").hidden = false;
}

function notice(kind, title = "", text = "") {
  byId("notice").hidden = !title;
  byId("notice").className = kind;
  byId("notice-title").textContent = title;
  byId("notice-text").textContent = text.charAt(0).toUpperCase() + text.slice(1);
  byId("again").hidden = true;
}

// ---------------------------------------------------------------------------------------------- mouse and keys

function clearSearch() {
  box.value = "";
  go(filters());
  box.focus();
}

const cards = () => [...results.querySelectorAll("a.card")];

function below(all, from, step) {
  // the card in the next row, up or down, whose middle is nearest
  const here = from.getBoundingClientRect();
  const middle = here.left + here.width / 2;
  const others = all.map((card) => [card, card.getBoundingClientRect()]);
  const beyond = others.filter(([, r]) => (step > 0 ? r.top >= here.bottom - 1 : r.bottom <= here.top + 1));
  const row = step > 0 ? Math.min(...beyond.map(([, r]) => r.top)) : Math.max(...beyond.map(([, r]) => r.top));
  const near = beyond.filter(([, r]) => Math.abs(r.top - row) < 2);
  near.sort(([, a], [, b]) => Math.abs(a.left + a.width / 2 - middle) - Math.abs(b.left + b.width / 2 - middle));
  return near.length ? near[0][0] : null;
}

function walk(event) {
  const all = cards();
  const at = all.indexOf(document.activeElement);
  let target = null;
  if (at < 0) {
    if (event.key !== "ArrowDown" || (document.activeElement !== box && document.activeElement !== document.body)) return;
    target = all[0];
  } else if (event.key === "ArrowRight") target = all[at + 1];
  else if (event.key === "ArrowLeft") target = all[at - 1];
  else target = below(all, all[at], event.key === "ArrowDown" ? 1 : -1) || (event.key === "ArrowUp" ? box : null);
  if (!target) return;
  event.preventDefault();
  target.focus();
}

document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  const typing = event.target.matches("input[type=search], input[type=text], textarea");
  const menu = byId("classes");
  if (event.key === "/" && !typing) {
    event.preventDefault();
    box.focus();
    box.select();
  } else if (event.key === "Escape" && menu && menu.open) {
    menu.open = false;
    menu.querySelector("summary").focus();
  } else if (event.key === "Escape") {
    event.preventDefault();
    clearSearch();
  } else if (event.key.startsWith("Arrow") && (!typing || event.target === box) && !event.target.matches("input[type=radio]")) {
    walk(event);
  }
});

results.addEventListener("click", (event) => {
  const card = event.target.closest("a.card");
  if (!card || event.button || event.ctrlKey || event.metaKey || event.shiftKey) return; // a new tab is the browser's
  event.preventDefault();
  go({ ...filters(), similar: card.dataset.id });
  results.focus({ preventScroll: true });
});

byId("search").addEventListener("submit", (event) => {
  event.preventDefault();
  const text = box.value.trim();
  go({ ...filters(), text });
});
byId("home").addEventListener("click", (event) => {
  if (event.button || event.ctrlKey || event.metaKey || event.shiftKey) return;
  event.preventDefault();
  go({ text: "", picture: "", similar: "", modality: "", classes: [] });
});
byId("clear").addEventListener("click", clearSearch);
byId("again").addEventListener("click", show);
byId("more").addEventListener("click", more);

document.querySelector(".filters").addEventListener("change", (event) => {
  if (!event.target.matches("input[name]")) return;
  const modality = document.querySelector("input[name=modality]:checked").value;
  const classes = [...document.querySelectorAll("input[name=class]:checked")].map((check) => check.value);
  go({ ...readState(), modality, classes });
});
if (byId("all-classes")) {
  byId("all-classes").addEventListener("click", () => {
    byId("classes").open = false;
    go({ ...readState(), classes: [] });
  });
  document.addEventListener("click", (event) => {
    if (!byId("classes").contains(event.target)) byId("classes").open = false;
  });
}
if (byId("narrow")) {
  byId("narrow").addEventListener("input", () => {
    const part = byId("narrow").value.trim().toLowerCase();
    for (const label of document.querySelectorAll(".options label")) {
      label.hidden = !label.textContent.toLowerCase().includes(part);
    }
  });
}

// ---------------------------------------------------------------------------------------------- pictures come in

byId("choose").addEventListener("click", () => byId("file").click());
byId("file").addEventListener("change", () => {
  searchPicture(byId("file").files[0]);
  byId("file").value = "";
});
const carries = (event) => event.dataTransfer && [...event.dataTransfer.types].includes("Files");
let inside = 0; // elements that the dragged file is over: leaving one for its child is no leaving
document.addEventListener("dragenter", (event) => {
  if (!carries(event)) return;
  event.preventDefault();
  inside += 1;
  byId("drop").hidden = false;
});
document.addEventListener("dragover", (event) => carries(event) && event.preventDefault());
document.addEventListener("dragleave", (event) => {
  if (!carries(event)) return;
  inside -= 1;
  byId("drop").hidden = inside <= 0;
});
document.addEventListener("drop", (event) => {
  inside = 0;
  byId("drop").hidden = true;
  if (!carries(event)) return;
  event.preventDefault();
  searchPicture(event.dataTransfer.files[0]);
});
document.addEventListener("paste", (event) => {
  const file = [...(event.clipboardData ? event.clipboardData.files : [])].find((one) => one.type.startsWith("image/"));
  if (!file) return;
  event.preventDefault();
  searchPicture(file);
});

window.addEventListener("popstate", show);
show();
