// The pictures of a sentence as it was typed: played back over the picture, and saved as a GIF.

import { encodeGif } from "./gif.js";
import { fileName } from "./text.js";

const KEPT = 120; // frames
const TIME = { each: 110, last: 1600 }; // ms
const SIDE = 256; // pixels of a small picture in the GIF, at most 512 of a large one

export class Film {
  #frames = []; // {blob, prompt, size, small, seed}
  #playing = 0;
  #stage;

  /** stage: what the playing covers, an element with an img and a text. changed: called with the number of frames. */
  constructor(stage, changed) {
    this.#stage = stage;
    this.changed = changed;
  }

  /** A text that begins otherwise begins another film, and so does another size. */
  add({ blob, prompt, header }) {
    const last = this.#frames.at(-1);
    if (last && (first(last.prompt) !== first(prompt) || last.size !== header.size)) this.#frames = [];
    if (last?.blob === blob) return;
    const { size, seed } = header;
    this.#frames = [...this.#frames, { blob, prompt, size, small: size.split("x")[0] < 256, seed }].slice(-KEPT);
    this.changed(this.#frames.length);
  }

  get isPlaying() {
    return this.#playing !== 0;
  }

  /** From its beginning, once. */
  async play() {
    const number = ++counter;
    this.#playing = number;
    const frames = this.#frames;
    const [image, text] = this.#stage.children;
    for (const [i, { blob, prompt, small }] of frames.entries()) {
      const url = URL.createObjectURL(blob);
      image.src = url;
      await image.decode().catch(() => {});
      URL.revokeObjectURL(url);
      if (this.#playing !== number) return; // stopped meanwhile: nothing is shown
      image.classList.toggle("small", small);
      text.textContent = prompt;
      this.#stage.hidden = false;
      await new Promise((done) => setTimeout(done, i === frames.length - 1 ? TIME.last : TIME.each));
      if (this.#playing !== number) return;
    }
    this.stop();
  }

  stop() {
    this.#playing = 0;
    this.#stage.hidden = true;
  }

  /** The GIF, and a name for it. smooth: whether small pictures are drawn soft. */
  async gif(smooth) {
    const frames = this.#frames;
    const drawn = [];
    for (const frame of frames) drawn.push(await withText(frame, smooth));
    const delays = drawn.map((_, i) => (i === drawn.length - 1 ? TIME.last : TIME.each) / 10);
    return { blob: encodeGif(drawn, delays), name: fileName({ ...frames.at(-1), format: "gif" }) };
  }
}

let counter = 0;

const first = (text) => text.slice(0, 1).toLowerCase();

/** A frame with the text below it, its end where it is long. */
async function withText({ blob, prompt, small }, smooth) {
  const bitmap = await createImageBitmap(blob);
  const scale = small ? Math.max(1, Math.round(SIDE / bitmap.width)) : Math.min(1, 512 / bitmap.width);
  const [width, height] = [bitmap.width * scale, bitmap.height * scale].map(Math.round);
  const line = Math.max(24, Math.round(width / 12));
  const canvas = new OffscreenCanvas(width, height + line);
  const paper = canvas.getContext("2d", { willReadFrequently: true });
  paper.imageSmoothingEnabled = !small || smooth;
  paper.drawImage(bitmap, 0, 0, width, height);
  paper.fillStyle = "#151413";
  paper.fillRect(0, height, width, line);
  paper.fillStyle = "#f2efeb";
  paper.font = `${Math.round(line * 0.54)}px system-ui, sans-serif`;
  const over = paper.measureText(prompt).width - (width - 16);
  paper.fillText(prompt, 8 - Math.max(0, over), height + line * 0.68);
  return paper.getImageData(0, 0, width, height + line);
}
