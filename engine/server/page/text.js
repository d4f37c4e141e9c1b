// Text that others read: shell commands, file names, the part of the address after "#".

export const EMBEDDED = "emoji-scenes"; // the model that `imagine-flash generate` draws with unless told otherwise

/** One word of a POSIX shell, whatever the text holds. */
export function quoted(text) {
  return /^[\w@%+=:,./-]+$/.test(text) ? text : `'${text.replaceAll("'", String.raw`'\''`)}'`;
}

/** The command that draws the same picture, but for the rounding of another backend or precision. `model` and `size` are
 * said only where they are not the defaults; where a model lies only its owner knows. */
export function command({ prompt, seed, steps, size, model, strength }) {
  const words = ["imagine-flash", "generate"];
  if (!prompt.startsWith("-")) words.push(quoted(prompt));
  if (model && model !== EMBEDDED) words.push("--model", quoted(`PATH/OF/${model}`));
  words.push("--seed", String(seed));
  if (steps) words.push("--steps", String(steps));
  if (size) {
    const [width, height] = size.split("x");
    words.push("--width", width, "--height", height);
  }
  if (strength) words.push("--image", "START.png", "--strength", String(strength));
  words.push("-o", "picture.png");
  if (prompt.startsWith("-")) words.push("--", quoted(prompt));
  return words.join(" ");
}

/** A server's message, with a capital letter and a full stop. */
export function sentence(text) {
  return `${text[0].toUpperCase()}${text.slice(1)}.`;
}

/** A file name: a-fox-on-pink-7.png. */
export function fileName({ prompt, seed, format }) {
  const slug = prompt.toLowerCase().replace(/[^\p{L}\p{N}]+/gu, "-").replace(/^-|-$/g, "").slice(0, 60);
  return `${slug || "picture"}-${seed}.${format === "jpeg" ? "jpg" : format}`;
}

/** A whole number from `low` up that JavaScript counts exactly, else null. */
export function whole(text, low = 0) {
  const number = /^\d+$/.test(String(text).trim()) ? Number(text) : NaN;
  return Number.isSafeInteger(number) && number >= low ? number : null;
}

/** What an address such as #prompt=a+fox&seed=7&steps=3 says; keys that it does not say are absent. */
export function fromHash(hash) {
  const said = new URLSearchParams(hash.replace(/^#/, ""));
  const found = {};
  if (said.has("prompt")) found.prompt = said.get("prompt").replace(/\s+/g, " ").slice(0, 4000);
  if (whole(said.get("seed") ?? "") !== null) found.seed = whole(said.get("seed"));
  if (whole(said.get("steps") ?? "", 1) !== null) found.steps = whole(said.get("steps"), 1);
  if (/^\d+x\d+$/.test(said.get("size") ?? "")) found.size = said.get("size");
  return found;
}

export function toHash(values) {
  const said = Object.entries(values).filter(([, value]) => value !== undefined && value !== "");
  return `#${new URLSearchParams(said.map(([name, value]) => [name, String(value)]))}`;
}
