// A picture that is drawn from, or under: a file, what is drawn here, or a camera. All end on one canvas, whose file goes to the server.

import { fileOf } from "./files.js";

const SIDE = 256; // pixels of the canvas that is drawn on, at least
const PAUSE = 80; // ms between two pictures of a camera or a stroke, at least
const stop = (stream) => stream.getTracks().forEach((track) => track.stop());
const SWATCHES = {
  black: "#1d1b19", white: "#ffffff", red: "#e5484d", orange: "#f76b15", yellow: "#ffd60a",
  green: "#46a758", blue: "#0090ff", purple: "#8e4ec6", pink: "#ff8dcf", brown: "#8d6e53",
};

/** Events: "change" when the picture or its amount is another. current: {blob, bytes, from} or null; from is the same object for
 * all strokes of one sketch and all pictures of one turn of the camera.
 *
 * root: a fieldset, which gets the parts of the template "picture-input". amount: what its slider says; most, value: of the slider;
 * paper, pen: the colours that drawing begins with; exact: whether files are without a loss where they can be.
 */
export class PictureInput extends EventTarget {
  #root;
  #canvas;
  #paper;
  #drawn; // how it is drawn: {paper, pen, exact}
  #kind = null; // file, sketch, camera
  #video = null;
  #size = [64, 64];
  #source = null; // what the canvas shows a cut of; null once it was drawn on
  #from = {}; // stands for the file, the sheet or the camera that the pictures come from
  #turn = 0; // counts what the canvas was made for: of another one, nothing that comes late is taken
  #last = 0;
  #timer = 0;
  #pen = null; // where the stroke is
  #colour;

  constructor(root, { amount, most = 1, value, camera = true, paper = "white", pen = "black", exact = false }) {
    super();
    this.current = null;
    this.isBusy = () => false; // whether the last one is still being drawn
    root.append(document.getElementById("picture-input").content.cloneNode(true));
    this.#root = root;
    this.#canvas = this.#find("sketch");
    this.#canvas.setAttribute("aria-label", root.querySelector("legend").textContent);
    this.#paper = this.#canvas.getContext("2d");
    this.#drawn = { paper: SWATCHES[paper], exact };
    this.#colour = SWATCHES[pen];
    Object.assign(this.#find("amount"), { min: 0.05, max: most, step: 0.05, value });
    this.#find("amount").setAttribute("aria-label", amount);
    this.#find("amount-name").textContent = amount;
    this.#find("camera-on").hidden = !camera;
    this.#on("file", "change", ({ target }) => target.files[0] && this.take(target.files[0]).finally(() => (target.value = "")));
    this.#on("sketch-on", "click", () => (this.#kind === "sketch" ? this.clear() : this.#sketch()));
    this.#on("camera-on", "click", () => (this.#kind === "camera" ? this.clear() : this.#film()));
    this.#on("off", "click", () => this.clear());
    this.#on("amount", "input", () => {
      this.#showAmount();
      this.#tell();
    });
    this.#on("wipe", "click", () => {
      this.#blank();
      this.#changed();
    });
    this.#showAmount();
    this.#fillSwatches(pen);
    this.#takeStrokes();
  }

  /** How much of it is taken; undefined without a picture. */
  get amount() {
    return this.current ? Number(this.#find("amount").value) : undefined;
  }

  /** Of the image API; null without a picture. */
  get blob() {
    return this.current?.blob ?? null;
  }

  get isOffered() {
    return !this.#root.hidden;
  }

  holds(target) {
    return this.#root.contains(target);
  }

  /** Whether the model takes one, and the size of what it draws, such as 64x64. */
  offer(possible, size) {
    this.#root.hidden = !possible;
    const before = this.#size.join("x");
    this.#size = size.split("x").map(Number);
    if (!this.#kind) return;
    if (!possible) this.clear();
    else if (size !== before) this.#reshape();
  }

  /** A file, or what was pasted or dropped. */
  async take(file) {
    const turn = ++this.#turn; // what is chosen while it is read, stays
    try {
      const bitmap = await createImageBitmap(file);
      if (turn !== this.#turn) return;
      this.#become("file", file);
      this.#from = {};
      this.#cover(bitmap, bitmap.width, bitmap.height);
      this.#changed();
    } catch {
      if (turn === this.#turn) this.#say("That is no picture that this browser can read.");
    }
  }

  /** What `current` and `amount` were at another time; without an amount there was none. Nothing is told: who brings it, draws. */
  async bring(picture, amount) {
    if (amount !== undefined) this.#find("amount").value = amount;
    this.#showAmount();
    if (picture && picture === this.current) return;
    this.current = this.isOffered && picture ? picture : null;
    this.#become(this.current && "file", this.current?.blob);
    this.#from = this.current?.from ?? {};
    if (amount !== undefined && !this.current) this.#say("The picture that was here is gone: choose it again.");
    if (!this.current) return;
    const turn = this.#turn;
    const bitmap = await createImageBitmap(picture.blob);
    if (turn === this.#turn) this.#cover(bitmap, bitmap.width, bitmap.height);
  }

  clear() {
    this.#become(null);
    this.current = null;
    this.#tell();
  }

  /** Clears it and says why. */
  refuse(why) {
    this.clear();
    this.#say(why);
  }

  #sketch() {
    const had = this.#kind !== null; // one draws on what is there
    this.#become("sketch", this.#source);
    this.#from = {};
    if (!had) this.#blank();
    this.#changed();
  }

  async #film() {
    let turn = ++this.#turn; // what is chosen while somebody is asked for it, stays
    try {
      const stream = await navigator.mediaDevices.getUserMedia({ video: { width: 640, height: 640, facingMode: "user" } });
      if (turn !== this.#turn) return stop(stream);
      this.#become("camera");
      turn = this.#turn;
      this.#from = {};
      this.#video = Object.assign(document.createElement("video"), { srcObject: stream, muted: true, playsInline: true });
      await this.#video.play();
      if (turn === this.#turn) this.#look();
    } catch (error) {
      if (turn === this.#turn) this.#say(navigator.mediaDevices ? `No camera: ${error.message}` : "A camera needs https, or this machine's own address.");
    }
  }

  /** The camera's picture, as soon as the last one is drawn. */
  #look() {
    if (!this.#video) return;
    if (!this.isBusy() && !document.hidden && this.#video.videoWidth) {
      this.#source = null;
      this.#paper.save();
      this.#paper.setTransform(-1, 0, 0, 1, this.#canvas.width, 0); // as in a mirror
      this.#cover(this.#video, this.#video.videoWidth, this.#video.videoHeight);
      this.#paper.restore();
      this.#changed();
    }
    this.#timer = setTimeout(() => this.#look(), PAUSE);
  }

  /** source: what the canvas is about to show a cut of, a file or a picture. */
  #become(kind, source = null) {
    this.#turn++;
    this.#source = source;
    clearTimeout(this.#timer);
    if (this.#video) stop(this.#video.srcObject);
    this.#video = null;
    this.#kind = kind;
    this.#shape();
    this.#find("panel").hidden = kind === null;
    this.#find("off").hidden = kind === null;
    this.#find("brushes").hidden = kind !== "sketch";
    this.#canvas.classList.toggle("drawing", kind === "sketch");
    for (const name of ["sketch", "camera"]) this.#find(`${name}-on`).setAttribute("aria-pressed", String(kind === name));
    this.#say("");
  }

  /** The canvas has the shape of what is drawn; setting its sides empties it. */
  #shape() {
    const scale = Math.max(1, SIDE / Math.max(...this.#size));
    const [width, height] = this.#size.map((side) => Math.round(side * scale));
    if (this.#canvas.width !== width || this.#canvas.height !== height) Object.assign(this.#canvas, { width, height });
  }

  /** The same picture for another size: cut anew out of all that there was of it. */
  async #reshape() {
    const turn = ++this.#turn;
    const source = this.#source ?? (await createImageBitmap(this.#canvas));
    const bitmap = await createImageBitmap(source);
    if (turn !== this.#turn) return;
    this.#shape();
    this.#source = source;
    this.#cover(bitmap, bitmap.width, bitmap.height);
    this.#changed();
  }

  #cover(image, width, height) {
    const { width: wide, height: high } = this.#canvas;
    const scale = Math.max(wide / width, high / height);
    this.#paper.fillStyle = this.#drawn.paper;
    this.#paper.fillRect(0, 0, wide, high);
    this.#paper.imageSmoothingQuality = "high";
    this.#paper.drawImage(image, (wide - width * scale) / 2, (high - height * scale) / 2, width * scale, height * scale);
  }

  #blank() {
    this.#source = null;
    this.#paper.fillStyle = this.#drawn.paper;
    this.#paper.fillRect(0, 0, this.#canvas.width, this.#canvas.height);
  }

  /** The canvas as a file of the model's size. */
  async #changed() {
    const turn = this.#turn;
    const file = await fileOf(this.#canvas, this.#size, this.#drawn.exact);
    if (turn !== this.#turn || !this.#kind) return;
    if (this.#kind === "camera" && this.isBusy()) return; // the next one will do: nobody's choice is closed by a late one
    this.current = { ...file, from: this.#from };
    this.#tell();
  }

  #tell() {
    this.dispatchEvent(new Event("change"));
  }

  #find(name) {
    return this.#root.querySelector(`.${name}`);
  }

  #on(name, type, act) {
    this.#find(name).addEventListener(type, act);
  }

  #showAmount() {
    this.#find("amount-shown").textContent = `${Math.round(100 * Number(this.#find("amount").value))} %`;
  }

  #say(text) {
    this.#find("said").textContent = text;
  }

  #takeStrokes() {
    const canvas = this.#canvas;
    const at = ({ clientX, clientY }) => {
      const box = canvas.getBoundingClientRect();
      return [((clientX - box.x) * canvas.width) / box.width, ((clientY - box.y) * canvas.height) / box.height];
    };
    canvas.addEventListener("pointerdown", (event) => {
      if (this.#kind !== "sketch") return;
      canvas.setPointerCapture(event.pointerId);
      this.#pen = at(event);
      this.#stroke(this.#pen);
    });
    canvas.addEventListener("pointermove", (event) => this.#pen && this.#stroke(at(event)));
    for (const end of ["pointerup", "pointercancel"]) {
      canvas.addEventListener(end, () => {
        if (this.#pen) this.#changed();
        this.#pen = null;
      });
    }
  }

  #stroke(to) {
    const paper = this.#paper;
    this.#source = null;
    Object.assign(paper, { strokeStyle: this.#colour, lineWidth: (Number(this.#find("brush").value) * this.#canvas.width) / SIDE, lineCap: "round" });
    paper.beginPath();
    paper.moveTo(...this.#pen);
    paper.lineTo(...to);
    paper.stroke();
    this.#pen = to;
    if (performance.now() - this.#last < PAUSE || this.isBusy()) return;
    this.#last = performance.now();
    this.#changed();
  }

  #fillSwatches(first) {
    const made = Object.entries(SWATCHES).map(([name, colour]) => {
      const box = Object.assign(document.createElement("input"), { type: "radio", name: `${this.#root.id}-colour`, checked: name === first });
      box.setAttribute("aria-label", name);
      box.addEventListener("change", () => (this.#colour = colour));
      const dot = document.createElement("span");
      dot.style.background = colour;
      const label = document.createElement("label");
      label.append(box, dot);
      return label;
    });
    this.#find("colours").replaceChildren(...made);
  }
}
