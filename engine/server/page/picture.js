// The picture and the strip of the last ones.

const SMALL = 256; // pixels: below, a picture is shown in squares, unless it shall be smooth
const KEPT = 16;
const STORED = "imagine-flash.strip";

/** Shows the newest picture: never one of an older request, and a preview only until the full one is there. */
export class Picture {
  #figure;
  #empty;
  #url = "";
  #newest = 0; // nothing older than this is shown
  #full = false; // of #newest, the full picture is shown

  constructor(figure) {
    this.#figure = figure;
    this.#empty = figure.firstElementChild;
    this.shown = null; // {header, blob, prompt, said, pictures, url}
  }

  /** True once it is in the page; false where something newer is shown by then. */
  async show({ header, blob, ...asked }) {
    if (!this.#wants(header)) return false;
    const url = URL.createObjectURL(blob);
    const image = new Image();
    image.src = url;
    image.alt = asked.prompt;
    try {
      await image.decode(); // so that it replaces the other without a flash
    } catch {
      URL.revokeObjectURL(url);
      return false;
    }
    if (!this.#wants(header)) {
      URL.revokeObjectURL(url);
      return false;
    }
    image.classList.toggle("small", image.naturalWidth < SMALL);
    this.#replace(image, url);
    this.shape(header.size);
    [this.#newest, this.#full, this.shown] = [header.seq, !header.preview, { header, blob, ...asked, url }];
    this.#mark(header, asked.prompt);
    return true;
  }

  /** Nothing, and nothing that was asked for before `seq`; the box is of the size that would be asked for, where it is known. */
  clear(seq, size) {
    this.#replace(this.#empty, "");
    if (size) this.shape(size);
    [this.#newest, this.#full, this.shown] = [seq, true, null];
    this.#mark({ seq, preview: false }, "");
  }

  /** The box of a size such as 64x64. A picture sets its own: one that is still shown is not stretched. */
  shape(size) {
    const [width, height] = size.split("x").map(Number);
    this.#figure.style.setProperty("--ratio", width / height);
    document.documentElement.style.setProperty("--most", `${Math.max(512, width)}px`);
  }

  #wants({ seq, preview }) {
    return seq > this.#newest || (seq === this.#newest && !this.#full && !preview);
  }

  #replace(element, url) {
    this.#figure.replaceChildren(element);
    if (this.#url) URL.revokeObjectURL(this.#url);
    this.#url = url;
  }

  #mark(header, prompt) {
    Object.assign(this.#figure.dataset, { prompt, preview: String(header.preview), seed: header.seed ?? "" });
    this.#figure.dataset.seq = header.seq; // last: who watches it finds the others set
  }
}

/** What a picture was drawn with beside its text, in words. */
function described({ lora = {}, guidance_scale, negative_prompt, condition_scale, strength }) {
  return [
    ...Object.entries(lora).map(([name, weight]) => `${name} ${weight}`),
    ...(guidance_scale === undefined ? [] : [`guidance ${guidance_scale}`]),
    ...(negative_prompt ? [`not ${negative_prompt}`] : []),
    ...(condition_scale ? ["under a picture"] : []),
    ...(strength ? ["from a picture"] : []),
  ];
}

/** The pictures somebody stayed at, newest first; a click brings one back by pick(drawn, pictures, event). They live as long as the
 * tab; the pictures that they were drawn from or under, which are too large for the browser's storage, as long as the page. */
export class Strip {
  #list;
  #items = new Map(); // what was drawn, from which pictures -> its element
  #pictures = new WeakMap(); // its element -> the pictures that it was drawn from and under
  #numbers = new WeakMap(); // of what these pictures came from
  #next = 1;

  constructor(list, pick) {
    this.#list = list;
    list.addEventListener("click", (event) => {
      const item = event.target.closest("li");
      if (item) pick(JSON.parse(item.dataset.drawn), this.#pictures.get(item) ?? {}, event);
    });
    this.#restore();
  }

  add({ header, blob, prompt, said, pictures }) {
    const { seed, steps, size } = header;
    const drawn = JSON.stringify({ prompt, seed, steps, size, ...said });
    const key = [drawn, this.#number(pictures.image), this.#number(pictures.condition)].join();
    const item = this.#items.get(key) ?? this.#made(drawn);
    this.#items.delete(key);
    this.#items.set(key, item); // the newest is the map's last
    this.#pictures.set(item, pictures);
    if (this.#list.firstElementChild !== item && !item.contains(document.activeElement)) this.#list.prepend(item);
    for (const old of [...this.#items.keys()].slice(0, -KEPT)) {
      this.#items.get(old).remove();
      this.#items.delete(old);
    }
    const reader = new FileReader();
    reader.onload = () => {
      item.querySelector("img").src = reader.result;
      this.#save();
    };
    reader.readAsDataURL(blob);
  }

  /** Of a picture that was drawn from, the same for one file, sketch or turn of the camera; 0 of none. */
  #number(picture) {
    if (!picture) return 0;
    if (!this.#numbers.has(picture.from)) this.#numbers.set(picture.from, this.#next++);
    return this.#numbers.get(picture.from);
  }

  #save() {
    const all = [...this.#items.values()].map((item) => [item.dataset.drawn, item.querySelector("img").src]);
    try {
      sessionStorage.setItem(STORED, JSON.stringify(all.filter(([, src]) => src)));
    } catch {
      // too large, or the browser stores nothing: they live as long as the page
    }
  }

  #restore() {
    try {
      for (const [drawn, src] of JSON.parse(sessionStorage.getItem(STORED) ?? "[]")) {
        const { strength, condition_scale } = JSON.parse(drawn);
        const gone = (of) => (of === undefined ? 0 : this.#next++); // a picture of an earlier page: which, nobody knows
        this.#items.set([drawn, gone(strength), gone(condition_scale)].join(), this.#made(drawn, src));
      }
    } catch {
      // as above
    }
  }

  #made(drawn, src = "") {
    const { prompt, seed, steps, size, ...said } = JSON.parse(drawn);
    const image = new Image();
    if (src) image.src = src;
    image.alt = "";
    image.classList.toggle("small", Number(size.split("x")[0]) < SMALL);
    const button = document.createElement("button");
    button.type = "button";
    button.title = [prompt, `seed ${seed}`, `${steps} steps`, ...described(said)].join(", ");
    button.setAttribute("aria-label", button.title);
    button.append(image);
    const item = document.createElement("li");
    item.dataset.drawn = drawn;
    item.append(button);
    this.#list.prepend(item);
    this.#list.parentElement.hidden = false;
    return item;
  }
}
