// The steps and the size, of those that the model draws.

import { drawsSize, offeredSizes } from "./text.js";

const find = (id) => document.getElementById(id);
const sizeOption = (name) => new Option(name.replace("x", " × "), name);

/** Event "change", with the time of the key or the pointer in `detail`. */
export class Choices extends EventTarget {
  #known = { sizes: [], steps: [] }; // what the model draws

  constructor() {
    super();
    this.steps = undefined; // the model's most
    find("steps").addEventListener("change", ({ target, timeStamp }) => {
      this.steps = Number(target.value);
      this.#tell(timeStamp);
    });
    find("size").addEventListener("change", ({ timeStamp }) => this.#tell(timeStamp));
  }

  /** Such as 64x64; undefined before the model is known. */
  get size() {
    return find("size").value || undefined;
  }

  /** What the model draws, as the server says it; size: the one that was wished before, if any. */
  offer(hello, size) {
    this.#known = hello;
    this.#fillSteps();
    const before = this.size ?? size;
    find("size").replaceChildren(...offeredSizes(hello).map(sizeOption));
    this.#chooseSize(before);
    find("size-field").hidden = find("size").options.length < 2;
  }

  /** Of the strip or of the address, where the model draws them; what is missing stays. */
  bring({ steps = this.steps, size }) {
    if (!this.#known.steps.length || this.#known.steps.includes(steps)) {
      this.steps = steps;
      const box = document.querySelector(`#steps input[value="${steps}"]`);
      if (box) box.checked = true;
    }
    this.#chooseSize(size);
  }

  /** A model of any size may be asked for one that is not among those that are offered. */
  #chooseSize(name) {
    if (!name || !drawsSize(this.#known, name)) return;
    if (![...find("size").options].some(({ value }) => value === name)) find("size").append(sizeOption(name));
    find("size").value = name;
  }

  #fillSteps() {
    const all = this.#known.steps;
    if (!all.includes(this.steps)) this.steps = Math.max(...all);
    const labels = all.map((number) => {
      const box = Object.assign(document.createElement("input"), { type: "radio", name: "steps", value: number });
      box.checked = number === this.steps;
      const label = document.createElement("label");
      label.append(box, Object.assign(document.createElement("span"), { textContent: number }));
      return label;
    });
    find("steps").replaceChildren(find("steps").firstElementChild, ...labels);
    find("steps").hidden = all.length < 2;
  }

  #tell(at) {
    this.dispatchEvent(new CustomEvent("change", { detail: at }));
  }
}
