// What the model can draw: examples, and the words of a model that knows only some.

const SCENES = {
  "a fox": "a fox on a pink background",
  "a cat and a dog": "a cat to the left of a dog",
  "a rocket": "a rocket above a house on a blue background",
  "a penguin": "a penguin on an orange background",
  "a pizza": "a pizza to the right of a robot on green",
};
const PROMPTS = {
  "lighthouse": "a lighthouse in a storm, oil painting, dramatic light",
  "cat astronaut": "portrait of a cat as an astronaut, studio photograph",
  "tiny house": "a tiny house inside a glass jar, macro photograph, soft light",
  "mountain lake": "a mountain lake at sunrise, mist, film photograph",
  "paper fox": "a fox made of folded paper, isometric, pastel colours",
};
export const FIRST = SCENES["a fox"];

/** Buttons of examples: scenes of known words where the model lists its words, else prompts of all kinds. */
export function fillExamples(place, vocabulary, pick) {
  const phrases = Object.values(vocabulary).flat();
  const joining = Object.keys(vocabulary).length > 1 ? ["a", "an", "on", "background"] : []; // groups leave them out
  const known = new Set([...joining, ...phrases.flatMap((phrase) => phrase.split(" "))]);
  const all = known.size ? SCENES : PROMPTS;
  const usable = Object.entries(all).filter(([, text]) => !known.size || text.split(" ").every((word) => known.has(word)));
  const chosen = usable.length || !known.size ? usable : phrases.slice(0, 5).map((word) => [word, word]);
  place.replaceChildren(...chosen.map(([label, text]) => button(label, (event) => pick(text, event), text)));
}

/** The groups of a vocabulary, each a row that one Tab reaches and arrow keys go through; add(word, event). */
export function fillVocabulary(place, vocabulary, add) {
  const groups = Object.entries(vocabulary);
  const rows = groups.map(([name, words]) => {
    const row = document.createElement("div");
    row.setAttribute("role", "toolbar");
    row.setAttribute("aria-label", groups.length > 1 ? name : "Words");
    row.append(...words.map((word) => button(word, (event) => add(word, event))));
    walk(row);
    const group = document.createElement("div");
    group.className = "group";
    if (groups.length > 1) group.append(Object.assign(document.createElement("b"), { textContent: name }));
    group.append(row);
    return group;
  });
  place.replaceChildren(place.firstElementChild, ...rows);
  place.hidden = !rows.length;
}

function button(text, act, title = "") {
  const made = Object.assign(document.createElement("button"), { type: "button", textContent: text, title });
  made.addEventListener("click", act);
  return made;
}

/** Arrow keys move through a toolbar, of which one button is in the order of Tab (WAI-ARIA's pattern). */
function walk(row) {
  const all = [...row.children];
  all.forEach((one, i) => (one.tabIndex = i ? -1 : 0));
  row.addEventListener("keydown", (event) => {
    const step = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
    const now = all.indexOf(document.activeElement);
    if (!step || now < 0) return;
    event.preventDefault();
    const next = all[(now + step + all.length) % all.length];
    [all[now].tabIndex, next.tabIndex] = [-1, 0];
    next.focus();
  });
}
