// What a page asks of its browser: to remember, to copy, to save.

const SMOOTH = "imagine-flash.smooth";
const find = (id) => document.getElementById(id);

/** Small pictures soft or in squares; the browser remembers it. */
export function smooth(on) {
  document.documentElement.classList.toggle("smooth", on);
  find("smooth").setAttribute("aria-pressed", String(on));
  try {
    localStorage.setItem(SMOOTH, on ? "1" : "");
  } catch {
    // it is asked for again next time
  }
}

export function isSmooth() {
  try {
    return Boolean(localStorage.getItem(SMOOTH));
  } catch {
    return false;
  }
}

/** A button says for a moment what came of it. */
export function flash(button, text) {
  const before = (button.dataset.text ??= button.textContent);
  button.textContent = text;
  find("said").textContent = text;
  setTimeout(() => (button.textContent = before), 1600);
}

/** A file to the reader's downloads. */
export function save(blob, name) {
  const url = URL.createObjectURL(blob);
  Object.assign(document.createElement("a"), { href: url, download: name }).click();
  setTimeout(() => URL.revokeObjectURL(url), 10_000);
}

/** Into the clipboard; pages that are not on https or this machine have the old way only. */
export async function toClipboard(text) {
  try {
    await navigator.clipboard.writeText(text);
    return true;
  } catch {
    const field = document.createElement("textarea");
    field.value = text;
    field.className = "hidden";
    document.body.append(field);
    field.select();
    const done = document.execCommand("copy");
    field.remove();
    return done;
  }
}
