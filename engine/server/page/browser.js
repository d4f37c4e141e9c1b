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

/** A field's text, set so that undo brings the one before back: assigned, it would take with it all that was typed. */
export function write(field, text) {
  if (field.value === text) return;
  const before = document.activeElement;
  const seen = before.matches(":focus-visible");
  const hush = (event) => event.stopImmediatePropagation(); // nobody typed
  addEventListener("input", hush, true);
  if (matchMedia("(pointer: fine)").matches) { // the focus would bring a phone's keyboard up
    field.focus({ preventScroll: true });
    field.select();
    document.execCommand(text ? "insertText" : "delete", false, text);
  }
  if (field.value !== text) field.value = text;
  removeEventListener("input", hush, true);
  if (before === field) return;
  field.blur();
  before.focus({ preventScroll: true, focusVisible: seen });
}

/** A click does the work, unless it is being done; meanwhile the button keeps the focus, which a disabled one loses. */
export function onClick(button, work) {
  button.addEventListener("click", async () => {
    if (button.ariaDisabled === "true") return;
    button.ariaDisabled = "true";
    try {
      await work();
    } finally {
      button.ariaDisabled = null;
    }
  });
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
