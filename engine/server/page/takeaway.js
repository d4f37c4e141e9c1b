// What can be taken away of the picture that is shown: its file, and the command that draws it.

import { command, fileName } from "./text.js";

const find = (id) => document.getElementById(id);

/** shown: {header, prompt, said, url} or null; hello: what the server said of its model. */
export function takeAway(shown, hello) {
  const link = find("download");
  find("copy").disabled = !shown;
  const spans = (shown ? commandOf(shown, hello) : []).map((text) => Object.assign(document.createElement("span"), { textContent: text }));
  find("command").replaceChildren(...spans.flatMap((span, i) => (i ? [" ", span] : [span])));
  if (!shown) {
    link.removeAttribute("href");
    return;
  }
  link.href = shown.url;
  link.download = fileName({ ...shown.header, prompt: shown.prompt });
}

function commandOf({ header, prompt, said }, { sizes, model }) {
  const size = header.size === sizes[0] ? undefined : header.size;
  return command({ ...header, ...said, prompt, size, model });
}
