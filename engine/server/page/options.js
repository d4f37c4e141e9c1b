// What a request says beside its text, seed, steps and size: guidance, what to draw away from, LoRAs. Shown where the model takes it.

const WIDEST = 2; // of a LoRA's slider, either way
const find = (id) => document.getElementById(id);

/** Event "change", with the time of the key or the pointer in `detail`. */
export class Options extends EventTarget {
  #wanted = { lora: {} }; // of the address, or of what was brought back: it may come before the model is known
  #known = { loras: [], guidance: null }; // what the model takes
  #default = ""; // of the slider of guidance
  #sliders = new Map(); // of LoRAs, by name

  constructor() {
    super();
    find("guidance").addEventListener("input", ({ target, timeStamp }) => this.#took("guidance_scale", Number(target.value), timeStamp));
    find("negative").addEventListener("input", ({ target, timeStamp }) => this.#took("negative_prompt", target.value, timeStamp));
  }

  /** What the model takes, as the server says it: {loras, guidance}. */
  offer({ loras = [], guidance = null }) {
    this.#known = { loras, guidance };
    find("guided").hidden = !guidance;
    find("negative").hidden = !guidance || guidance.embedded;
    if (guidance) {
      const [low, high] = guidance.range ?? [1, 2 * guidance.default];
      const slider = Object.assign(find("guidance"), { min: Math.min(low, guidance.default), max: Math.max(high, guidance.default) });
      slider.value = guidance.default;
      this.#default = slider.value;
    }
    this.#show();
  }

  /** What was said of another picture: {lora, guidance_scale, negative_prompt}; what is missing is none. */
  bring({ lora = {}, guidance_scale, negative_prompt }) {
    this.#wanted = { lora: { ...lora }, guidance_scale, negative_prompt };
    this.#show();
  }

  /** Of a request. LoRAs that were asked for and are not there are asked for, and the server says which there are. */
  get said() {
    const lora = Object.fromEntries(Object.entries(this.#wanted.lora).filter(([, weight]) => weight));
    const scale = find("guidance").value;
    const guided = this.#known.guidance !== null;
    const against = guided && !this.#known.guidance.embedded && Number(scale) > 1 && this.#wanted.negative_prompt?.trim();
    return {
      lora: Object.keys(lora).length ? lora : undefined,
      guidance_scale: guided && scale !== this.#default ? Number(scale) : undefined,
      negative_prompt: against || undefined,
    };
  }

  #took(name, value, at) {
    this.#wanted[name] = value;
    this.#show();
    this.dispatchEvent(new CustomEvent("change", { detail: at }));
  }

  #show() {
    const { lora, guidance_scale, negative_prompt = "" } = this.#wanted;
    find("guidance").value = guidance_scale ?? this.#default;
    find("guidance-shown").textContent = Number(find("guidance").value).toFixed(1);
    find("negative").disabled = Number(find("guidance").value) <= 1;
    if (find("negative").value !== negative_prompt) find("negative").value = negative_prompt;
    this.#fill([...new Set([...this.#known.loras, ...Object.keys(lora)])]);
    for (const [name, { slider, shown }] of this.#sliders) {
      slider.value = lora[name] ?? 0;
      if (lora[name]) lora[name] = Number(slider.value); // within its ends
      shown.textContent = Number(slider.value) ? Number(slider.value).toFixed(2) : "off";
    }
  }

  /** A slider for each name; those that are there stay, and keep the focus. */
  #fill(names) {
    if (names.join("\n") === [...this.#sliders.keys()].join("\n")) return;
    this.#sliders = new Map(names.map((name) => [name, this.#slider(name)]));
    const labels = [...this.#sliders.values()].map(({ label }) => label);
    find("loras").replaceChildren(find("loras").firstElementChild, ...labels);
    find("loras").hidden = !names.length;
  }

  #slider(name) {
    const slider = Object.assign(document.createElement("input"), { type: "range", min: -WIDEST, max: WIDEST, step: 0.05, value: 0 });
    slider.setAttribute("aria-label", name);
    slider.addEventListener("input", ({ timeStamp }) => this.#took("lora", { ...this.#wanted.lora, [name]: Number(slider.value) }, timeStamp));
    const shown = Object.assign(document.createElement("span"), { className: "shown" });
    const label = document.createElement("label");
    label.append(Object.assign(document.createElement("span"), { textContent: name, title: name }), slider, shown);
    return { label, slider, shown };
  }
}
