// What is measured, in milliseconds, and pictures per second while somebody types.

const PAUSE = 1000; // ms without a picture: the typing before has ended
const WINDOW = 2000; // ms that the rate looks back

export class Figures {
  #fields;
  #spent = { seq: 0 }; // of the engine for the newest request that came: seconds
  #shown = []; // when the pictures of this burst of typing were shown
  #typed = 0; // the newest request of which one was

  constructor(fields) {
    this.#fields = fields; // {all, model, queue, rest, page, rate}
  }

  /** A picture arrived: what the engine has spent on its request; a preview's time counts too. */
  arrived({ seq, timings: { total, queue = 0 } }) {
    const before = this.#spent.seq === seq ? this.#spent : { total: 0, queue: 0 };
    this.#spent = { seq, total: before.total + total, queue: before.queue + queue };
    return this.#spent;
  }

  /** It is shown. Times by performance.now(): of the key (null where nobody pressed one), of sending, receiving, showing. */
  shown({ total, queue }, { key, sent, received, shown }) {
    const rest = Math.max(0, received - sent - 1000 * total);
    const values = { model: 1000 * (total - queue), queue: 1000 * queue, rest };
    if (key !== null) Object.assign(values, { all: shown - key, page: shown - key - (received - sent) });
    for (const name of ["all", "model", "queue", "rest", "page"]) this.#write(name, values[name], "ms");
  }

  /** A picture was shown of a text that somebody types: the full one after its preview is no other. */
  typed(seq, at) {
    if (seq === this.#typed) return;
    this.#typed = seq;
    if (at - (this.#shown.at(-1) ?? at) > PAUSE) this.#shown = [];
    this.#shown = [...this.#shown, at].filter((time) => at - time <= WINDOW);
    if (this.#shown.length < 4) return;
    this.#write("rate", (1000 * (this.#shown.length - 1)) / (at - this.#shown[0]), "per s");
  }

  #write(name, value, unit) {
    const field = this.#fields[name];
    field.parentElement.hidden = value === undefined; // a row of dashes says nothing
    if (value === undefined) return;
    const number = value < 9.95 ? value.toFixed(1) : String(Math.round(value));
    field.replaceChildren(number, Object.assign(document.createElement("small"), { textContent: ` ${unit}` }));
  }
}
