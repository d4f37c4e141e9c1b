// Text that others read: shell commands, file names, the part of the address after "#".

export const EMBEDDED = "emoji-scenes"; // the model that `imagine-flash generate` draws with unless told otherwise

/** One word of a POSIX shell, whatever the text holds. */
export function quoted(text) {
  return /^[\w@%+=:,./-]+$/.test(text) ? text : `'${text.replaceAll("'", String.raw`'\''`)}'`;
}

/** The command that draws the same picture, but for the rounding of another backend or precision, in parts: an option and its
 * value each. `model` and `size` are said only where they are not the defaults; where a model, a LoRA or a picture lies only its
 * owner knows. */
export function command({ prompt, seed, steps, size, model, strength, condition_scale, lora = {}, guidance_scale, negative_prompt }) {
  const [width, height] = size?.split("x") ?? [];
  const dashed = prompt.startsWith("-");
  const parts = [
    ["imagine-flash", "generate", ...(dashed ? [] : [prompt])],
    model && model !== EMBEDDED && ["--model", `PATH/OF/${model}`],
    ["--seed", seed],
    steps && ["--steps", steps],
    size && ["--width", width],
    size && ["--height", height],
    ...Object.entries(lora).map(([name, weight]) => ["--lora", `${name}=PATH/OF/${name}:${weight}`]),
    guidance_scale !== undefined && ["--guidance", guidance_scale],
    negative_prompt && ["--negative-prompt", negative_prompt],
    strength && ["--image", "START.png"],
    strength && ["--strength", strength],
    condition_scale && ["--condition", "CONDITION.png"],
    condition_scale && ["--condition-scale", condition_scale],
    ["-o", "picture.png"],
    dashed && ["--", prompt],
  ];
  return parts.filter(Boolean).map((words) => words.map((word) => quoted(String(word))).join(" "));
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
  if (Number(said.get("guidance_scale")) > 0) found.guidance_scale = Number(said.get("guidance_scale"));
  if (said.get("negative_prompt")) found.negative_prompt = said.get("negative_prompt").slice(0, 4000);
  const loras = said.getAll("lora").map((text) => /^([^:]+):(-?[\d.]+)$/.exec(text)).filter((one) => Number(one?.[2]));
  if (loras.length) found.lora = Object.fromEntries(loras.map(([, name, weight]) => [name, Number(weight)]));
  return found;
}

const SHAPES = [1, 4 / 3, 3 / 4, 3 / 2, 2 / 3, 16 / 9, 9 / 16]; // width over height

/** The sizes of a model, and of one that draws any size the common shapes with as many pixels as its first. */
export function offeredSizes({ sizes, any_size: any }) {
  if (!any || !sizes.length) return sizes;
  const [width, height] = sizes[0].split("x").map(Number);
  const side = (pixels) => Math.min(any.largest, Math.max(any.smallest, Math.round(pixels / any.multiple) * any.multiple));
  const shapes = SHAPES.map((ratio) => `${side(Math.sqrt(width * height * ratio))}x${side(Math.sqrt((width * height) / ratio))}`);
  return [...new Set([...sizes, ...shapes])];
}

/** Whether the model draws a size such as 640x384. */
export function drawsSize({ sizes, any_size: any }, name) {
  const sides = name.split("x").map(Number);
  return sizes.includes(name) || Boolean(any && sides.every((n) => n >= any.smallest && n <= any.largest && n % any.multiple === 0));
}

export function toHash({ lora = {}, ...values }) {
  const said = Object.entries(values).filter(([, value]) => value !== undefined && value !== "");
  said.push(...Object.entries(lora).map(([name, weight]) => ["lora", `${name}:${weight}`]));
  return `#${new URLSearchParams(said.map(([name, value]) => [name, String(value)]))}`;
}
