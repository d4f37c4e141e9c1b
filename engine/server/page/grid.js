// Four seeds of one text, to choose from.

const COUNT = 4;

/** Asks the image API for four pictures and shows them as buttons in `place`; a click calls pick({prompt, seed, steps}, event). */
export class Grid {
  #place;
  #back; // what is focused once it closes
  #asking = null;

  constructor(place, back, pick) {
    this.#place = place;
    this.#back = back;
    this.pick = pick;
    place.addEventListener("keydown", ({ key }) => key === "Escape" && this.close());
  }

  /** From the moment it is asked for. */
  get isOpen() {
    return this.#asking !== null;
  }

  /** wish: what the API takes; pictures: its image and condition as {blob, amount}, where there are any. Raises Error. */
  async open(wish, headers, { image, condition }) {
    this.close();
    this.#asking = new AbortController();
    const body = { ...wish, n: COUNT, strength: image.amount, condition_scale: condition.amount, output_format: "webp", output_compression: 95 };
    const files = { image: image.blob, condition: condition.blob };
    const uploads = Object.values(files).some(Boolean);
    const found = await answered(`v1/images/${uploads ? "edits" : "generations"}`, {
      method: "POST",
      headers: uploads ? headers : { ...headers, "content-type": "application/json" },
      body: uploads ? form(body, files) : JSON.stringify(body),
      signal: this.#asking.signal,
    });
    const buttons = found.data.map(({ b64_json, seed }) => this.#button(b64_json, { ...wish, seed }, found));
    const away = Object.assign(document.createElement("button"), { type: "button", textContent: "Back", className: "away" });
    away.addEventListener("click", () => this.close());
    this.#place.replaceChildren(...buttons, away);
    this.#place.hidden = false;
    buttons[0].focus({ preventScroll: true });
  }

  close() {
    this.#asking?.abort();
    this.#asking = null;
    if (this.#place.hidden) return;
    const held = this.#place.contains(document.activeElement);
    this.#place.hidden = true;
    this.#place.replaceChildren();
    if (held) this.#back.focus({ preventScroll: true });
  }

  #button(data, wish, { output_format, size }) {
    const image = new Image();
    image.src = `data:image/${output_format};base64,${data}`;
    image.alt = "";
    image.classList.toggle("small", Number(size.split("x")[0]) < 256);
    const button = document.createElement("button");
    button.type = "button";
    button.setAttribute("aria-label", `Take seed ${wish.seed}`);
    button.append(image, Object.assign(document.createElement("span"), { textContent: wish.seed }));
    button.addEventListener("click", (event) => {
      this.close();
      this.pick(wish, event);
    });
    return button;
  }
}

/** What the API answers. Raises Error with what it says; of something that is not the API, and of no answer, what we say. */
async function answered(address, request) {
  let answer, text;
  try {
    answer = await fetch(address, request);
    text = await answer.text();
  } catch (error) {
    throw error.name === "AbortError" ? error : new Error("the server does not answer");
  }
  try {
    const found = JSON.parse(text);
    if (answer.ok) return found;
    text = found.error.message;
  } catch {
    text = `something between here and the server answered with ${answer.status}`;
  }
  throw new Error(text);
}

function form(values, files) {
  const filled = new FormData();
  for (const [name, value] of Object.entries(values)) {
    if (value !== undefined) filled.set(name, typeof value === "object" ? JSON.stringify(value) : value);
  }
  for (const [name, blob] of Object.entries(files)) if (blob) filled.set(name, blob, name);
  return filled;
}
