// The page: each change of the text, seed, steps or size is a request, and the newest one's picture is shown.

import { flash, isSmooth, onClick, save, smooth, toClipboard, write } from "./browser.js";
import { Choices } from "./choices.js";
import { Figures } from "./figures.js";
import { takeFiles } from "./files.js";
import { Film } from "./film.js";
import { Grid } from "./grid.js";
import { PictureInput } from "./input.js";
import { Options } from "./options.js";
import { Picture, Strip } from "./picture.js";
import { say, sayDrawing } from "./say.js";
import { Stream } from "./stream.js";
import { takeAway } from "./takeaway.js";
import { fromHash, sentence, toHash, whole } from "./text.js";
import { fillExamples, fillVocabulary, FIRST } from "./words.js";

const SETTLED = 800; // ms without a change: the picture is meant
const SLOW = 0.1; // s of drawing from which a picture in one step is asked for first
const SEEN = 250; // ms of drawing before it is said
const BUSY = [400, 800, 1600, 3000]; // ms to wait before asking a busy server again

const find = (id) => document.getElementById(id);
const [prompt, seed, note] = ["prompt", "seed", "note"].map(find);
const stream = new Stream();
const picture = new Picture(find("picture"));
const strip = new Strip(find("strip"), (drawn, pictures, event) => bringBack(drawn, event, pictures));
const grid = new Grid(find("grid"), find("four"), (wish, event) => bringBack(wish, event));
const choices = new Choices();
const options = new Options();
const source = new PictureInput(find("source"), { amount: "Drawn anew", value: 0.6 });
const condition = new PictureInput(find("condition"), { amount: "How strongly", most: 2, value: 1, camera: false, paper: "black", pen: "white", exact: true });
const film = new Film(find("reel"), (frames) => (find("film").hidden = frames < 2));
const figures = new Figures(
  Object.fromEntries(["all", "model", "queue", "rest", "page", "rate"].map((name) => [name, find(`f-${name}`)])),
);

let hello = { sizes: [], steps: [], formats: ["jpeg"], model: "" }; // what the model draws
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
  asked = { seq: asked.seq + 1, prompt: text, seed: good, steps: choices.steps, size: choices.size, said, at, typed };
  asked.pictures = { image: source.current, condition: condition.current };
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
  const { seq, steps, size } = asked;
  const preview = seconds > SLOW && steps !== 1;
  const format = small(size) && hello.formats.includes("png") ? "png" : "jpeg"; // 64 x 64: 6 kB without a loss
  asked.sent = performance.now();
  waiting.set(seq, asked);
  stream.send({ seq, prompt: text, seed: good, steps, size, format, preview, ...said }, asked.pictures);
}

function small(name) {
  const [width, height] = (name ?? hello.sizes[0] ?? "512x512").split("x").map(Number);
  return width * height <= 128 * 128;
}

/** The text, seed, steps, size and options of the strip or of the address, of the strip the pictures too; of an example the text alone. */
function bringBack(wanted, event = null, pictures = null) {
  keep();
  if (wanted.prompt !== undefined) write(prompt, wanted.prompt);
  if (wanted.seed !== undefined) seed.value = wanted.seed;
  choices.bring(wanted);
  offerPictures();
  if (pictures) {
    source.bring(pictures.image, wanted.strength);
    condition.bring(pictures.condition, wanted.condition_scale);
  }
  if (Object.keys(wanted).length > 1) options.bring(wanted);
  fit();
  draw(event?.timeStamp ?? null);
}

// What comes back

stream.addEventListener("picture", async ({ detail: { header, blob, at } }) => {
  const mine = waiting.get(header.seq);
  const spent = figures.arrived(header);
  if (!mine || !(await picture.show({ header, blob, prompt: mine.prompt, said: mine.said, pictures: mine.pictures }))) return;
  for (const seq of waiting.keys()) if (seq < header.seq + !header.preview) waiting.delete(seq); // others may be under way
  if (mine.typed) figures.typed(header.seq, performance.now());
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
  waiting.clear(); // of another connection: they do not come any more
  choices.offer(hello, fromHash(location.hash).size);
  find("smooth").hidden = !hello.sizes.some(small);
  if (!picture.shown) picture.shape(choices.size);
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

stream.addEventListener("refused", ({ detail: name }) => ({ image: source, condition })[name].refuse("The picture is too large for this server."));

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

function offerPictures() {
  if (!choices.size) return; // nothing is known yet
  source.offer(hello.from_pictures, choices.size);
  condition.offer(hello.condition, choices.size);
}

/** A word of the vocabulary, after the text. */
function add(word, { timeStamp }) {
  write(prompt, `${prompt.value.trimEnd()} ${word}`.trimStart());
  fit();
  draw(timeStamp);
}

const oneLine = (text) => text.replace(/\s*[\r\n]+\s*/g, " ");

/** As high as its text. */
function fit() {
  prompt.style.height = "auto";
  prompt.style.height = `${prompt.scrollHeight + 2}px`; // 2: the line below it
}

prompt.addEventListener("beforeinput", (event) => {
  if (!/[\r\n]/.test(event.data ?? "")) return;
  event.preventDefault(); // what is pasted is one line already before it is in, so that the caret stays and undo takes it back
  document.execCommand("insertText", false, oneLine(event.data));
});
prompt.addEventListener("input", ({ timeStamp }) => {
  if (/[\r\n]/.test(prompt.value)) prompt.value = oneLine(prompt.value);
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
choices.addEventListener("change", ({ detail }) => {
  keep();
  offerPictures();
  draw(detail);
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
onClick(find("four"), async () => {
  const wish = { prompt: prompt.value.trim(), seed: good, steps: choices.steps, size: choices.size, ...options.said };
  if (!wish.prompt) return prompt.focus();
  keep();
  try {
    await grid.open(wish, stream.headers, { image: source, condition });
  } catch (error) {
    grid.close();
    if (error.name === "AbortError") return;
    if (stream.ready) say("failed", sentence(error.message));
    else say(stream.state, stream.why); // which asks for a key where one is needed
  }
});
find("play").addEventListener("click", () => (film.isPlaying ? film.stop() : film.play()));
onClick(find("gif"), async () => {
  try {
    const { blob, name } = await film.gif(isSmooth());
    save(blob, name);
  } catch {
    flash(find("gif"), "Not saved");
  }
});
addEventListener("keydown", ({ key }) => key === "Escape" && (film.stop(), grid.close()));
setInterval(() => {
  const ms = waiting.size ? performance.now() - Math.min(...[...waiting.values()].map(({ sent }) => sent)) : 0;
  sayDrawing(ms > SEEN ? ms : null);
}, 100);
find("again").addEventListener("click", () => (stream.state === "ready" ? draw() : stream.connect()));
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
const first = { prompt: FIRST, ...fromHash(location.hash) };
prompt.value = first.prompt; // there is nothing before it to bring back
bringBack(first);
takeAway(picture.shown, hello);
if (matchMedia("(pointer: fine)").matches) {
  prompt.focus();
  prompt.select(); // the first key replaces the example
}
stream.connect();
