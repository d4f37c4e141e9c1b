// The connection to /v1/stream (docs/protocol.md): it finds out why it failed, and comes back by itself.

import { sentence } from "./text.js";

const KEY = "imagine-flash.key";
const TOO_LARGE = 1009;
const RESTARTING = 1012;
const LATER = 1013;
const FULL = /at most \d+ may be/; // in the reason of 1013: as many streams are open; else the model is being loaded
const BEAT = 400; // ms from one look whether the server is there to the next
const SILENCE = 1500; // ms without a word of it, though it was asked: it hangs
const GONE = 5000; // ms of it after which the connection is taken for lost: something between may have forgotten it
const TOKEN = /^[\w!#$%&'*+.^`|~-]+$/; // what a browser may offer as a subprotocol

/** The key, for as long as this tab lives; where the browser stores nothing, as long as this page. */
const remembered = {
  own: "",
  get key() {
    try {
      return sessionStorage.getItem(KEY) ?? "";
    } catch {
      return this.own;
    }
  },
  set key(value) {
    this.own = value;
    try {
      value ? sessionStorage.setItem(KEY, value) : sessionStorage.removeItem(KEY);
    } catch {
      // kept in `own`
    }
  },
};

/** The message of an error of the server; of something before it, none. */
async function said(answer) {
  try {
    return sentence((await answer.json()).error.message);
  } catch {
    return undefined;
  }
}

/** Events: "state", "ready" {hello}, "picture" {header, blob, at}, "failure" {seq, error}, "refused" (by its name, a picture that
 * is too large for the server).
 *
 * States: connecting, ready, hanging (it says nothing), loading, full (of others), restarting, lost, blocked (the server answers, the socket does not), forbidden (to pages
 * of this address), key (one is needed), wrong-key. `why`: what the server said of the state, where it said something.
 */
export class Stream extends EventTarget {
  #socket = null;
  #pictures = {}; // by name, those that the server has
  #last = ""; // the name of the one that was sent last
  #heard = 0; // when it last said something
  #looked = 0;
  #timer = 0;
  #failures = 0; // since a picture came: a server that ends whatever it reads says "ready" each time

  constructor() {
    super();
    this.state = "connecting";
    this.why = undefined;
    addEventListener("online", () => this.state !== "ready" && this.connect());
    document.addEventListener("visibilitychange", () => !document.hidden && this.state === "lost" && this.connect());
    setInterval(() => this.#look(), BEAT);
    addEventListener("pageshow", (event) => event.persisted && this.connect()); // back from the browser's cache
  }

  get ready() {
    return this.state === "ready" || this.state === "hanging";
  }

  connect() {
    clearTimeout(this.#timer);
    this.#drop();
    if (!["lost", "loading", "full", "restarting", "blocked", "forbidden"].includes(this.state)) this.#become("connecting");
    const { key } = remembered;
    const url = new URL("v1/stream", document.baseURI.replace(/^http/, "ws"));
    url.hash = url.search = "";
    const socket = new WebSocket(url, ["imagine-flash", ...(key ? [`imagine-flash.key.${key}`] : [])]);
    this.#socket = socket;
    socket.binaryType = "arraybuffer";
    socket.onmessage = ({ data }) => this.#take(data);
    let opened = false;
    socket.onopen = () => (opened = true);
    socket.onclose = ({ code, reason }) => this.#closed(code, reason, opened);
  }

  /** What an ordinary request needs to be let in. */
  get headers() {
    return remembered.key ? { authorization: `Bearer ${remembered.key}` } : {};
  }

  /** False where there is no connection; the newest request is sent again at "ready". pictures: {bytes} or null of the image to
   * start from and of the condition, by these names. */
  send(request, pictures = {}) {
    if (!this.ready) return false;
    for (const [name, picture] of Object.entries(pictures)) {
      if (!picture || picture === this.#pictures[name]) continue;
      if (name === "condition") this.#socket.send('{"type":"condition"}');
      this.#socket.send(picture.bytes);
      this.#pictures[name] = picture;
      this.#last = name;
    }
    this.#socket.send(JSON.stringify(request));
    return true;
  }

  /** False where a browser cannot send this key. */
  use(key) {
    if (!TOKEN.test(key)) return false;
    remembered.key = key;
    this.#failures = 0;
    this.connect();
    return true;
  }

  #take(data) {
    const at = performance.now();
    this.#heard = at;
    if (this.state === "hanging") this.#become("ready");
    if (typeof data !== "string") {
      const length = new DataView(data).getUint32(0);
      const header = JSON.parse(new TextDecoder().decode(new Uint8Array(data, 4, length)));
      const blob = new Blob([new Uint8Array(data, 4 + length)], { type: `image/${header.format}` });
      this.#failures = 0;
      this.#tell("picture", { header, blob, at });
      return;
    }
    const message = JSON.parse(data);
    if (message.type === "ready") {
      this.#pictures = {};
      this.#last = "";
      this.#become("ready");
      this.#tell("ready", message);
    } else if (message.type === "error") {
      this.#tell("failure", message);
    }
  }

  async #closed(code, reason, opened) {
    this.#socket = null;
    const later = FULL.test(reason) ? "full" : "loading";
    const known = { [TOO_LARGE]: "connecting", [RESTARTING]: "restarting", [LATER]: later }[code] ?? (opened ? "lost" : undefined);
    const [found, why] = known ? [known] : await this.#reason();
    if (this.#socket) return; // connected again meanwhile
    this.#become(found, why);
    if (code === TOO_LARGE && this.#last) this.#tell("refused", this.#last);
    if (found === "key" || found === "wrong-key") return; // until somebody gives one
    const longest = found === "loading" ? 2000 : 4000;
    const delay = Math.min(longest, 300 * 2 ** this.#failures++) * (0.8 + 0.4 * Math.random());
    this.#timer = setTimeout(() => this.connect(), delay);
  }

  /** Asks whether the server is there. A page that was not looked at, or was busy itself, has not heard and does not judge. */
  #look() {
    const now = performance.now();
    if (!this.ready || document.hidden || now - this.#looked > 3 * BEAT) this.#heard = now;
    this.#looked = now;
    if (!this.ready) return;
    if (now - this.#heard > SILENCE && this.state === "ready") this.#become("hanging");
    if (now - this.#heard > SILENCE + GONE) {
      this.#become("lost");
      return this.connect();
    }
    if (now - this.#heard >= BEAT / 2) this.#socket.send('{"type":"ping"}');
  }

  /** Why a socket did not open: a browser does not say, an ordinary request does. One that would draw, if it had a body: pages
   * of any address may read, and are refused only here. */
  async #reason() {
    const { key } = remembered;
    try {
      const answer = await fetch("v1/images/generations", { method: "POST", headers: this.headers, signal: AbortSignal.timeout(5000) });
      if (answer.status === 401) {
        remembered.key = "";
        return [key ? "wrong-key" : "key"];
      }
      if (answer.status === 403) return ["forbidden", await said(answer)];
      return [answer.status === 503 ? "loading" : answer.status < 500 ? "blocked" : "lost"];
    } catch {
      return ["lost"];
    }
  }

  #drop() {
    if (!this.#socket) return;
    this.#socket.onclose = this.#socket.onmessage = this.#socket.onopen = null;
    this.#socket.close();
    this.#socket = null;
  }

  #become(state, why) {
    Object.assign(this, { state, why });
    this.#tell("state");
  }

  #tell(type, detail) {
    this.dispatchEvent(new CustomEvent(type, { detail }));
  }
}
