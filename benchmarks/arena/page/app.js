// Asks for pairs one after another and sends what was chosen.
const at = (id) => document.getElementById(id);
const [left, right] = document.querySelectorAll("img");
const keys = { ArrowLeft: "left", ArrowRight: "right", " ": "tie" };
let name = "", shown = null, since = 0; // shown: the pair that is looked at

async function ask(path, options) {
  const answer = await fetch(path, options);
  if (!answer.ok) throw Object.assign(new Error(`${answer.status}: ${await answer.text()}`), { status: answer.status });
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
  for (const [side, img] of Object.entries({ left, right })) img.src = `picture/${found.pair}/${side}?annotator=${who}&shown=${found.shown}`;
  await Promise.all([left.decode(), right.decode()]);
  shown = found;
  since = performance.now();
}

async function choose(side) {
  if (shown === null) return next(); // its pictures did not come: once more
  const ballot = { annotator: name, pair: shown.pair, shown: shown.shown, side, seconds: (performance.now() - since) / 1000 };
  try {
    await ask("vote", { method: "POST", headers: { "content-type": "application/json" }, body: JSON.stringify(ballot) });
  } catch (error) {
    if (error.status !== 409) throw error; // the vote may be given again
    shown = null;
    await next();
    throw error;
  }
  shown = null;
  await next();
}

/** Does one thing at a time: a second key while a vote is sent is not a second vote. */
async function act(work) {
  if (at("vote").ariaBusy === "true") return;
  at("vote").ariaBusy = "true";
  at("problem").textContent = "";
  try {
    await work();
  } catch (error) {
    at("problem").textContent = error.message;
  } finally {
    at("vote").ariaBusy = "false";
  }
}

at("who").addEventListener("submit", (event) => {
  event.preventDefault();
  name = at("name").value;
  at("who").hidden = true;
  at("vote").hidden = false;
  act(next);
});
for (const button of document.querySelectorAll("[data-side]")) {
  button.addEventListener("click", (event) => {
    if (event.detail) button.blur(); // of a mouse: else the next space would press it
    act(() => choose(button.dataset.side));
  });
}
document.addEventListener("keydown", (event) => {
  const presses = event.key === " " && document.activeElement?.closest("button");
  if (at("vote").hidden || !(event.key in keys) || event.repeat || presses) return;
  event.preventDefault();
  act(() => choose(keys[event.key]));
});
