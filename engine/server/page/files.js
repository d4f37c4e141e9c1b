// Files of pictures: one that the server takes, and those that are dropped or pasted.

const MOST = 250_000; // bytes that the server takes of a picture
const LOSSY = [{ type: "image/webp", quality: 0.9 }, { type: "image/jpeg", quality: 0.7 }, { type: "image/jpeg", quality: 0.4 }];

/** A canvas as a file: {blob, bytes}. exact: without a loss where that is small enough. What is too large at any quality has fewer
 * pixels, which the server scales. */
export async function fileOf(canvas, [width, height], exact) {
  const kinds = exact || width * height <= 128 * 128 ? [{ type: "image/png" }, ...LOSSY] : LOSSY;
  let blob;
  for (const part of [1, 1 / 2, 1 / 4]) {
    const sides = [width, height].map((side) => Math.max(1, Math.round(side * part)));
    const small = new OffscreenCanvas(...sides);
    const paper = small.getContext("2d");
    paper.imageSmoothingQuality = "high";
    paper.drawImage(canvas, 0, 0, ...sides);
    for (const kind of kinds) {
      blob = await small.convertToBlob(kind);
      if (blob.size <= MOST) return { blob, bytes: await blob.arrayBuffer() };
    }
  }
  return { blob, bytes: await blob.arrayBuffer() };
}

/** What is dropped or pasted goes where it is dropped or where the focus is, else to the first input that the model has. */
export function takeFiles(inputs) {
  const give = (file, target) => {
    const offered = inputs.filter((one) => one.isOffered);
    return (offered.find((one) => one.holds(target)) ?? offered[0])?.take(file);
  };
  for (const name of ["dragover", "drop"]) {
    addEventListener(name, (event) => {
      if (!event.dataTransfer.types.includes("Files")) return; // text goes where it is dropped
      event.preventDefault();
      const [file] = event.dataTransfer.files; // none before it is dropped
      if (file) give(file, event.target);
    });
  }
  addEventListener("paste", (event) => {
    if (event.clipboardData.types.includes("text/plain")) return; // of a table, say, whose picture comes along
    const file = [...event.clipboardData.files].find(({ type }) => type.startsWith("image/"));
    if (!file) return;
    event.preventDefault();
    give(file, event.target);
  });
}
