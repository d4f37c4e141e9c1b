// A picture to start from: a file, what is drawn here, or a camera. All end on one canvas, whose file goes to the server.

const MOST = 250_000; // bytes that the server takes of a picture
const SIDE = 256; // pixels of the canvas that is drawn on
const PAUSE = 80; // ms between two pictures of a camera or a stroke, at least
const SWATCHES = ["#1d1b19", "#ffffff", "#e5484d", "#f76b15", "#ffd60a", "#46a758", "#0090ff", "#8e4ec6", "#ff8dcf", "#8d6e53"];

const find = (id) => document.getElementById(id);

/** Events: "change" when what is drawn from is another. current: {blob, bytes} or null. */
export class Source extends EventTarget {
  #canvas = find("sketch");
  #paper = this.#canvas.getContext("2d");
  #kind = null; // file, sketch, camera
  #video = null;
  #size = [64, 64];
  #last = 0;
  #timer = 0;
  #pen = null; // where the stroke is
  #colour = SWATCHES[0];

  constructor() {
    super();
    this.current = null;
    this.isBusy = () => false; // whether the last one is still being drawn
    find("file").addEventListener("change", ({ target }) => target.files[0] && this.take(target.files[0]).finally(() => (target.value = "")));
    find("sketch-on").addEventListener("click", () => (this.#kind === "sketch" ? this.clear() : this.#sketch()));
    find("camera-on").addEventListener("click", () => (this.#kind === "camera" ? this.clear() : this.#film()));
    find("source-off").addEventListener("click", () => this.clear());
    find("strength").addEventListener("input", () => {
      find("strength-shown").textContent = `${Math.round(100 * this.strength)} %`;
      this.#tell();
    });
    find("wipe").addEventListener("click", () => {
      this.#blank();
      this.#changed();
    });
    this.#fillSwatches();
    this.#takeStrokes();
    this.#takeDrops();
  }

  get strength() {
    return Number(find("strength").value);
  }

  /** Whether the model draws from pictures, and the size of what it draws, such as 64x64. */
  offer(possible, size) {
    find("source").hidden = !possible;
    this.#size = size.split("x").map(Number);
    if (!possible) this.clear();
    else if (this.#kind) this.#changed();
  }

  /** A file, or what was pasted or dropped. */
  async take(file) {
    if (find("source").hidden) return;
    try {
      const bitmap = await createImageBitmap(file);
      this.#become("file");
      this.#cover(bitmap, bitmap.width, bitmap.height);
      this.#changed();
    } catch {
      this.#say("That is no picture that this browser can read.");
    }
  }

  clear() {
    this.#become(null);
    this.current = null;
    this.#tell();
  }

  #sketch() {
    const had = this.#kind !== null; // one draws on what is there
    this.#become("sketch");
    if (!had) this.#blank();
    this.#changed();
  }

  async #film() {
    try {
      const stream = await navigator.mediaDevices.getUserMedia({ video: { width: 640, height: 640, facingMode: "user" } });
      this.#become("camera");
      this.#video = Object.assign(document.createElement("video"), { srcObject: stream, muted: true, playsInline: true });
      await this.#video.play();
      this.#look();
    } catch (error) {
      this.#say(navigator.mediaDevices ? `No camera: ${error.message}` : "A camera needs https, or this machine's own address.");
    }
  }

  /** The camera's picture, as soon as the last one is drawn. */
  #look() {
    if (!this.#video) return;
    if (!this.isBusy() && !document.hidden && this.#video.videoWidth) {
      this.#paper.save();
      this.#paper.setTransform(-1, 0, 0, 1, this.#canvas.width, 0); // as in a mirror
      this.#cover(this.#video, this.#video.videoWidth, this.#video.videoHeight);
      this.#paper.restore();
      this.#changed();
    }
    this.#timer = setTimeout(() => this.#look(), PAUSE);
  }

  #become(kind) {
    clearTimeout(this.#timer);
    for (const track of this.#video?.srcObject.getTracks() ?? []) track.stop();
    this.#video = null;
    this.#kind = kind;
    const [width, height] = this.#size;
    const scale = SIDE / Math.max(width, height);
    const sides = [width, height].map((side) => Math.round(side * scale));
    if (this.#canvas.width !== sides[0] || this.#canvas.height !== sides[1]) [this.#canvas.width, this.#canvas.height] = sides;
    find("source-panel").hidden = kind === null;
    find("source-off").hidden = kind === null;
    find("brushes").hidden = kind !== "sketch";
    this.#canvas.classList.toggle("drawing", kind === "sketch");
    for (const name of ["sketch", "camera"]) find(`${name}-on`).setAttribute("aria-pressed", String(kind === name));
    this.#say("");
  }

  #cover(image, width, height) {
    const { width: wide, height: high } = this.#canvas;
    const scale = Math.max(wide / width, high / height);
    this.#paper.fillStyle = "#fff";
    this.#paper.fillRect(0, 0, wide, high);
    this.#paper.imageSmoothingQuality = "high";
    this.#paper.drawImage(image, (wide - width * scale) / 2, (high - height * scale) / 2, width * scale, height * scale);
  }

  #blank() {
    this.#paper.fillStyle = "#fff";
    this.#paper.fillRect(0, 0, this.#canvas.width, this.#canvas.height);
  }

  /** The canvas as a file of the model's size. */
  async #changed() {
    const kind = this.#kind;
    const [width, height] = this.#size;
    const small = new OffscreenCanvas(width, height);
    const paper = small.getContext("2d");
    paper.imageSmoothingQuality = "high";
    paper.drawImage(this.#canvas, 0, 0, width, height);
    let blob = await small.convertToBlob(width * height <= 128 * 128 ? { type: "image/png" } : { type: "image/webp", quality: 0.9 });
    if (blob.size > MOST) blob = await small.convertToBlob({ type: "image/jpeg", quality: 0.7 });
    const bytes = await blob.arrayBuffer();
    if (this.#kind !== kind || kind === null) return;
    this.current = { blob, bytes };
    this.#tell();
  }

  #tell() {
    this.dispatchEvent(new Event("change"));
  }

  #say(text) {
    find("source-said").textContent = text;
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
    Object.assign(paper, { strokeStyle: this.#colour, lineWidth: Number(find("brush").value), lineCap: "round" });
    paper.beginPath();
    paper.moveTo(...this.#pen);
    paper.lineTo(...to);
    paper.stroke();
    this.#pen = to;
    if (performance.now() - this.#last < PAUSE || this.isBusy()) return;
    this.#last = performance.now();
    this.#changed();
  }

  #takeDrops() {
    for (const name of ["dragover", "drop"]) {
      addEventListener(name, (event) => {
        if (!event.dataTransfer.types.includes("Files")) return; // text goes where it is dropped
        event.preventDefault();
        const [file] = event.dataTransfer.files; // none before it is dropped
        if (file) this.take(file);
      });
    }
    addEventListener("paste", (event) => {
      const file = [...event.clipboardData.files].find(({ type }) => type.startsWith("image/"));
      if (!file) return;
      event.preventDefault();
      this.take(file);
    });
  }

  #fillSwatches() {
    const names = ["black", "white", "red", "orange", "yellow", "green", "blue", "purple", "pink", "brown"];
    const made = SWATCHES.map((colour, i) => {
      const box = Object.assign(document.createElement("input"), { type: "radio", name: "colour", checked: !i });
      box.setAttribute("aria-label", names[i]);
      box.addEventListener("change", () => (this.#colour = colour));
      const dot = document.createElement("span");
      dot.style.background = colour;
      const label = document.createElement("label");
      label.append(box, dot);
      return label;
    });
    find("colours").replaceChildren(...made);
  }
}
