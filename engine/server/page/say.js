// The state of the page, in words.

const find = (id) => document.getElementById(id);
const main = document.querySelector("main");
const STATES = {
  connecting: ["connecting"],
  ready: ["ready"],
  busy: ["busy", "Too many pictures are waiting. This one is asked for again in a moment."],
  failed: ["not drawn"],
  loading: ["loading the model", "The model is being loaded. It draws in a moment."],
  full: ["full", "Too many pages are open at this server. This one tries again by itself."],
  restarting: ["restarting", "The server is restarting. The page comes back by itself."],
  lost: ["no connection", "The server does not answer. The page keeps trying."],
  hanging: ["no answer", "The server has said nothing for two seconds. What you see may be old."],
  blocked: ["no connection", "The server answers, but the connection for drawing does not open. Something between may not pass on WebSockets."],
  forbidden: ["not allowed", "The server does not let this page draw."],
  key: ["needs a key", "This server draws for those who have a key. It is kept until this tab is closed."],
  "wrong-key": ["needs a key", "The server does not know that key."],
};

/** Whether a picture is being drawn, and for how long: what is shown is of an older text. */
export function sayDrawing(ms) {
  const text = ms === null || main.dataset.state !== "ready" ? "" : ms < 2000 ? "drawing" : `drawing, ${Math.floor(ms / 1000)} s`;
  main.toggleAttribute("data-drawing", text !== "");
  const shown = text || STATES[main.dataset.state][0];
  if (find("state-text").textContent !== shown) find("state-text").textContent = shown;
}

/** `text` and `again` of one error; by default the state's own. */
export function say(state, text = STATES[state][1] ?? "", again = ["lost", "hanging", "blocked", "forbidden"].includes(state)) {
  const needsKey = state === "key" || state === "wrong-key";
  if (main.dataset.state !== state) main.dataset.state = state;
  if (find("state-text").textContent !== STATES[state][0]) find("state-text").textContent = STATES[state][0];
  if (find("trouble-text").textContent !== text) find("trouble-text").textContent = text;
  find("trouble").hidden = !text;
  find("again").hidden = !again;
  if (needsKey && find("key-form").hidden) requestAnimationFrame(() => find("key").focus());
  find("key-form").hidden = !needsKey;
}
