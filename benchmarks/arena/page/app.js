// Asks for pairs one after another and sends what was chosen.
const at = (id) => document.getElementById(id);
const [left, right] = document.querySelectorAll("img");
const keys = { ArrowLeft: "left", ArrowRight: "right", " ": "tie" };
let name = "", pair = null, since = 0;

async function ask(path, options) {
  const answer = await fetch(path, options);
  if (!answer.ok) throw new Error(`${answer.status}: ${await answer.text()}`);
  return answer.status === 204 ? null : answer.json();
}

async function next() {
  const who = encodeURIComponent(name);
  const found = await ask(`next?annotator=${who}`);
  at("count").textContent = `${found.judged} of ${found.total}`;
  at("vote").hidden = found.pair === null;
  at("end").hidden = found.pair !== null;
  if (found.pair === null) return;
  at("caption").textContent = found.caption;
  left.src = `picture/${found.pair}/left?annotator=${who}`;
  right.src = `picture/${found.pair}/right?annotator=${who}`;
  await Promise.all([left.decode(), right.decode()]);
  pair = found.pair;
  since = performance.now();
}

async function choose(side) {
  if (pair === null) return;
  const ballot = { annotator: name, pair, side, seconds: (performance.now() - since) / 1000 };
  pair = null; // a second key while it is sent is not a second vote
  await ask("vote", { method: "POST", headers: { "content-type": "application/json" }, body: JSON.stringify(ballot) });
  await next();
}

const shown = (work) => work.then(() => { at("problem").textContent = ""; }, (error) => { at("problem").textContent = error.message; });

at("who").addEventListener("submit", (event) => {
  event.preventDefault();
  name = at("name").value;
  at("who").hidden = true;
  shown(next());
});
for (const button of document.querySelectorAll("[data-side]")) button.addEventListener("click", () => shown(choose(button.dataset.side)));
document.addEventListener("keydown", (event) => {
  if (at("vote").hidden || !(event.key in keys) || event.repeat) return;
  event.preventDefault();
  shown(choose(keys[event.key]));
});
