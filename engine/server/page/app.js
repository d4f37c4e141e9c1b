// The page: each change of the text, seed, steps or size is a request, and the newest one's picture is shown.

import { flash, isSmooth, save, smooth, toClipboard } from "./browser.js";
import { Figures } from "./figures.js";
import { Film } from "./film.js";
import { Grid } from "./grid.js";
import { PictureInput, takeFiles } from "./input.js";
import { Options } from "./options.js";
import { Picture, Strip } from "./picture.js";
import { say, sayDrawing } from "./say.js";
import { Stream } from "./stream.js";
import { takeAway } from "./takeaway.js";
import { drawsSize, fromHash, offeredSizes, sentence, toHash, whole } from "./text.js";
import { fillExamples, fillVocabulary, FIRST } from "./words.js";

const SETTLED = 800; // ms without a change: the picture is meant
const SLOW = 0.1; // s of drawing from which a picture in one step is asked for first
const SEEN = 250; // ms of drawing before it is said
const BUSY = [400, 800, 1600, 3000]; // ms to wait before asking a busy server again

const find = (id) => document.getElementById(id);
const [prompt, seed, size, note] = ["prompt", "seed", "size", "note"].map(find);
const stream = new Stream();
const picture = new Picture(find("picture"));
const strip = new Strip(find("strip"), (drawn, event) => bringBack(drawn, event));
const grid = new Grid(find("grid"), (wish, event) => bringBack(wish, event));
const options = new Options();
const source = new PictureInput(find("source"), { amount: "Drawn anew", value: 0.6 });
const condition = new PictureInput(find("condition"), { amount: "How strongly", most: 2, value: 1, camera: false, paper: "black", pen: "white", exact: true });
const film = new Film(find("reel"), (frames) => (find("film").hidden = frames < 2));
const figures = new Figures(
  Object.fromEntries(["all", "model", "queue", "rest", "page", "rate"].map((name) => [name, find(`f-${name}`)])),
);

let hello = { sizes: [], steps: [], formats: ["jpeg"], model: "" }; // what the model draws
let steps; // undefined: the model's most
let good = whole(seed.defaultValue); // the last seed that was one
let asked = { seq: 0 }; // the newest request: what was sent, and when
const waiting = new Map(); // by number, the requests whose pictures may still come
let seconds = 0; // of drawing, lately
let refusals = 0; // of a busy server, in a row
let settling = 0; // the timer; 0 once it has run
let retrying = 0;
let keyed = false; // a key was given, and nothing has come of it yet

// Asking

/** Asks for what the page says now. `at`: when the key was pressed, or null; typed: by somebody who types on. */
function draw(at = null, typed = false) {
  clearTimeout(retrying);
  clearTimeout(settling);
  film.stop();
  grid.close();
  const text = prompt.value.trim();
  const number = whole(seed.value);
  const invalid = String(number === null);
  good = number ?? good;
  if (seed.ariaInvalid !== invalid) {
    seed.ariaInvalid = invalid;
    unknown([]);
  }
  const said = { ...options.said, strength: source.amount, condition_scale: condition.amount };
  asked = { seq: asked.seq + 1, prompt: text, seed: good, steps, size: size.value || undefined, said, at, typed };
  settling = setTimeout(() => {
    settling = 0;
    settle();
  }, SETTLED);
  if (!typed) share();
  if (!text) {
    picture.clear(asked.seq, asked.size);
    waiting.clear();
    takeAway(picture.shown, hello);
    unknown([]);
    say(stream.state, stream.why); // what was wrong was wrong with another text
    return;
  }
  const { seq } = asked;
  const preview = seconds > SLOW && steps !== 1;
  const format = small(asked.size) && hello.formats.includes("png") ? "png" : "jpeg"; // 64 x 64: 6 kB without a loss
  asked.sent = performance.now();
  waiting.set(seq, asked);
  const pictures = { image: source.current, condition: condition.current };
  stream.send({ seq, prompt: text, seed: good, steps, size: asked.size, format, preview, ...said }, pictures);
}

function small(name) {
  const [width, height] = (name ?? hello.sizes[0] ?? "512x512").split("x").map(Number);
  return width * height <= 128 * 128;
}

/** The text, seed, steps, size and options of the strip or of the address; of an example the text alone. */
function bringBack(wanted, event = null) {
  keep();
  if (wanted.prompt !== undefined) prompt.value = wanted.prompt;
  if (wanted.seed !== undefined) seed.value = wanted.seed;
  if (!hello.steps.length || hello.steps.includes(wanted.steps)) choose(wanted.steps ?? steps);
  chooseSize(wanted.size);
  if (Object.keys(wanted).length > 1) options.bring(wanted);
  fit();
  draw(event?.timeStamp ?? null);
}

// What comes back

stream.addEventListener("picture", async ({ detail: { header, blob, at } }) => {
  const mine = waiting.get(header.seq);
  const spent = figures.arrived(header);
  if (!mine || !(await picture.show({ header, blob, prompt: mine.prompt, said: mine.said }))) return;
  for (const seq of waiting.keys()) if (seq < header.seq + !header.preview) waiting.delete(seq); // others may be under way
  if (mine.typed) figures.typed(performance.now());
  takeAway(picture.shown, hello);
  if (header.preview) return;
  film.add(picture.shown);
  refusals = 0;
  seconds = header.timings.total - (header.timings.queue ?? 0);
  say(stream.state);
  unknown(header.unknown_words, header.cut);
  if (!settling) settle(); // it was drawn slowly
  const shown = await new Promise((painted) => requestAnimationFrame(() => painted(performance.now())));
  if (picture.shown?.header === header) figures.shown(spent, { key: mine.at, sent: mine.sent, received: at, shown });
});

stream.addEventListener("failure", ({ detail: { seq, error } }) => {
  if (seq !== null && seq !== asked.seq) return; // of a text that has changed
  waiting.clear();
  if (error.code === "busy") {
    say("busy");
    retrying = setTimeout(draw, BUSY[Math.min(refusals++, BUSY.length - 1)]);
  } else {
    unknown([]);
    say("failed", sentence(error.message), error.type === "server_error");
  }
});

stream.addEventListener("ready", ({ detail }) => {
  hello = detail;
  fillSteps();
  fillSizes();
  fillExamples(find("examples"), hello.vocabulary ?? {}, (text, event) => bringBack({ prompt: text }, event));
  fillVocabulary(find("vocabulary"), hello.vocabulary ?? {}, add);
  options.offer(hello);
  offerPictures();
  if (keyed) prompt.focus();
  keyed = false;
  find("model").textContent = `${hello.model} · ${hello.backend}`;
  if (picture.shown?.header.seq !== asked.seq || picture.shown.header.preview) draw();
});

stream.addEventListener("state", () => say(stream.state, stream.why));

// Saying

/** Below the text: that the seed is none, or words that the model never saw, but for the one that is being typed. */
function unknown(words, cut = "") {
  const typing = asked.typed && performance.now() - asked.sent < SETTLED ? prompt.value.split(/[\s,]/).at(-1) : "";
  const seen = words.filter((word) => word !== typing.toLowerCase());
  let text = seen.length ? `The model never saw: ${seen.join(", ")}` : "";
  if (!text && cut) text = `Too long for the model, left out: ${cut}`;
  const negative = picture.shown?.header.seq === asked.seq && picture.shown.header.cut_negative;
  if (!text && negative) text = `The negative prompt is too long for the model, left out: ${negative}`;
  if (seed.ariaInvalid === "true") text = `A seed is a whole number, 0 to ${seed.max}`;
  if (note.textContent !== text) note.textContent = note.title = text; // the line may be too short for it
}

/** Nobody changed anything for a while, and the picture may be there. */
function settle() {
  share();
  if (picture.shown?.header.seq !== asked.seq) return;
  unknown(picture.shown.header.unknown_words, picture.shown.header.cut);
  find("said").textContent = `Drawn: ${picture.shown.prompt}`;
  keep();
}

/** The address brings this picture back, once the page knows what the model draws; before, the address is the wish. */
function share() {
  if (!hello.sizes.length) return;
  const size = asked.size === hello.sizes[0] ? undefined : asked.size;
  history.replaceState(null, "", toHash({ prompt: asked.prompt, seed: asked.seed, steps: asked.steps, size, ...options.said }));
}

function keep() {
  if (!picture.shown || picture.shown.header.preview || picture.shown.header.seq !== asked.seq) return;
  strip.add(picture.shown);
}

// Controls

function choose(number) {
  steps = number;
  const box = document.querySelector(`#steps input[value="${number}"]`);
  if (box) box.checked = true;
}

function fillSteps() {
  const most = Math.max(...hello.steps);
  if (!hello.steps.includes(steps)) steps = most;
  const labels = hello.steps.map((number) => {
    const box = Object.assign(document.createElement("input"), { type: "radio", name: "steps", value: number });
    box.checked = number === steps;
    const label = document.createElement("label");
    label.append(box, Object.assign(document.createElement("span"), { textContent: number }));
    return label;
  });
  find("steps").replaceChildren(find("steps").firstElementChild, ...labels);
  find("steps").hidden = hello.steps.length < 2;
}

function fillSizes() {
  const before = size.value || fromHash(location.hash).size;
  find("smooth").hidden = !hello.sizes.some(small);
  size.replaceChildren(...offeredSizes(hello).map(sizeOption));
  chooseSize(before);
  find("size-field").hidden = size.options.length < 2;
  if (!picture.shown) picture.shape(size.value);
}

const sizeOption = (name) => new Option(name.replace("x", " × "), name);

/** A size of the strip or of the address, if the model draws it: one of any size need not be among those that are offered. */
function chooseSize(name) {
  if (!name || !drawsSize(hello, name)) return;
  if (![...size.options].some(({ value }) => value === name)) size.append(sizeOption(name));
  size.value = name;
}

function offerPictures() {
  const drawn = size.value || hello.sizes[0];
  source.offer(hello.from_pictures, drawn);
  condition.offer(hello.condition, drawn);
}

/** A word of the vocabulary, after the text. */
function add(word, { timeStamp }) {
  prompt.value = `${prompt.value.trimEnd()} ${word}`.trimStart();
  fit();
  draw(timeStamp);
}

/** As high as its text. */
function fit() {
  prompt.style.height = "auto";
  prompt.style.height = `${prompt.scrollHeight + 2}px`; // 2: the line below it
}

prompt.addEventListener("input", ({ timeStamp }) => {
  if (/[\r\n]/.test(prompt.value)) prompt.value = prompt.value.replace(/\s*[\r\n]+\s*/g, " ");
  fit();
  draw(timeStamp, true);
});
prompt.addEventListener("keydown", (event) => event.key === "Enter" && !event.isComposing && event.preventDefault());
find("words").addEventListener("submit", (event) => event.preventDefault());
seed.addEventListener("input", ({ timeStamp }) => draw(timeStamp, true));
find("dice").addEventListener("click", ({ timeStamp }) => {
  keep();
  seed.value = crypto.getRandomValues(new Uint32Array(1))[0] % 100000;
  draw(timeStamp);
});
find("steps").addEventListener("change", (event) => {
  keep();
  steps = Number(event.target.value);
  draw(event.timeStamp);
});
size.addEventListener("change", ({ timeStamp }) => {
  keep();
  offerPictures();
  draw(timeStamp);
});
for (const input of [source, condition]) {
  input.isBusy = () => waiting.size > 0 || grid.isOpen; // who chooses is not hurried
  input.addEventListener("change", () => draw(null, true));
}
takeFiles([source, condition]);
options.addEventListener("change", ({ detail }) => draw(detail, true));
find("copy").addEventListener("click", async () => {
  flash(find("copy"), (await toClipboard(find("command").textContent)) ? "Copied" : "Not copied");
});
find("link").addEventListener("click", async () => {
  share();
  flash(find("link"), (await toClipboard(location.href)) ? "Copied" : "Not copied");
});
find("smooth").addEventListener("click", () => smooth(!isSmooth()));
find("four").addEventListener("click", async () => {
  const wish = { prompt: prompt.value.trim(), seed: good, steps, size: size.value || undefined, ...options.said };
  if (!wish.prompt) return prompt.focus();
  keep();
  find("four").disabled = true;
  try {
    await grid.open(wish, stream.headers, { image: source, condition });
  } catch (error) {
    grid.close();
    if (error.name !== "AbortError") say("failed", sentence(error.message));
  }
  find("four").disabled = false;
});
find("play").addEventListener("click", () => (film.isPlaying ? film.stop() : film.play()));
find("gif").addEventListener("click", async () => {
  find("gif").disabled = true;
  const { blob, name } = await film.gif(isSmooth());
  find("gif").disabled = false;
  save(blob, name);
});
addEventListener("keydown", ({ key }) => key === "Escape" && (film.stop(), grid.close()));
setInterval(() => {
  const ms = waiting.size ? performance.now() - Math.min(...[...waiting.values()].map(({ sent }) => sent)) : 0;
  sayDrawing(ms > SEEN ? ms : null);
}, 100);
find("again").addEventListener("click", () => (stream.ready ? draw() : stream.connect()));
find("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  const sent = stream.use(find("key").value.trim());
  keyed = sent;
  if (sent) find("key").value = "";
  else find("trouble-text").textContent = "A browser cannot send that key: it may hold letters, digits and - . _ ~ ! # $ % & ' * + ^ ` | only.";
});
addEventListener("hashchange", () => bringBack(fromHash(location.hash)));
addEventListener("resize", fit);

smooth(isSmooth());
find("vocabulary").open = matchMedia("(min-width: 640px)").matches;
bringBack({ prompt: FIRST, ...fromHash(location.hash) });
takeAway(picture.shown, hello);
if (matchMedia("(pointer: fine)").matches) {
  prompt.focus();
  prompt.select(); // the first key replaces the example
}
stream.connect();
