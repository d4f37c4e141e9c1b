// An animated GIF (GIF89a, looping) of frames of one size, with one palette of 256 colours for all.

const BITS = 5; // of a channel, as far as the palette tells colours apart
const index = (r, g, b) => ((r >> 3) << (2 * BITS)) | ((g >> 3) << BITS) | (b >> 3);

/** frames: ImageData of one size; delays: of each, in hundredths of a second. Returns a Blob. */
export function encodeGif(frames, delays) {
  const { width, height } = frames[0];
  const { colours, nearest } = palette(frames);
  const word = (value) => [value & 255, value >> 8];
  const parts = [
    bytes("GIF89a", ...word(width), ...word(height), 0xf7, 0, 0, ...colours), // 0xf7: a palette of 256
    bytes(0x21, 0xff, 11, "NETSCAPE2.0", 3, 1, 0, 0, 0), // for ever
  ];
  frames.forEach((frame, i) => {
    const pixels = new Uint8Array(width * height);
    for (let at = 0; at < pixels.length; at++) pixels[at] = nearest[index(frame.data[4 * at], frame.data[4 * at + 1], frame.data[4 * at + 2])];
    parts.push(bytes(0x21, 0xf9, 4, 0, ...word(delays[i]), 0, 0), bytes(0x2c, 0, 0, 0, 0, ...word(width), ...word(height), 0));
    parts.push(...blocks(compress(pixels)));
  });
  return new Blob([...parts, bytes(0x3b)], { type: "image/gif" });
}

function bytes(...values) {
  return new Uint8Array(values.flatMap((value) => (typeof value === "string" ? [...value].map((c) => c.charCodeAt(0)) : value)));
}

/** Median cut (Heckbert 1982): boxes of colours are halved at their median along their longest side. */
function palette(frames) {
  const counts = new Uint32Array(1 << (3 * BITS));
  const sums = new Float64Array(3 << (3 * BITS));
  for (const { data } of frames) {
    for (let i = 0; i < data.length; i += 4) {
      const at = index(data[i], data[i + 1], data[i + 2]);
      counts[at]++;
      for (let c = 0; c < 3; c++) sums[3 * at + c] += data[i + c];
    }
  }
  const used = [...counts.keys()].filter((at) => counts[at]);
  const boxes = [boxOf(used, counts)];
  while (boxes.length < 256) {
    boxes.sort((a, b) => a.worth - b.worth);
    if (!boxes.at(-1).worth) break;
    boxes.push(...halves(boxes.pop(), counts));
  }
  const colours = new Uint8Array(3 * 256);
  const nearest = new Uint8Array(counts.length);
  boxes.forEach(({ members, total }, box) => {
    for (const at of members) nearest[at] = box;
    for (let c = 0; c < 3; c++) colours[3 * box + c] = members.reduce((sum, at) => sum + sums[3 * at + c], 0) / total;
  });
  return { colours, nearest };
}

const channel = (at, c) => (at >> (BITS * (2 - c))) & 31;

/** worth: of halving it, 0 where it holds one colour. */
function boxOf(members, counts) {
  const spans = [0, 1, 2].map((c) => {
    let [low, high] = [31, 0];
    for (const at of members) [low, high] = [Math.min(low, channel(at, c)), Math.max(high, channel(at, c))];
    return high - low;
  });
  const span = Math.max(...spans);
  const total = members.reduce((sum, at) => sum + counts[at], 0);
  return { members, total, axis: spans.indexOf(span), worth: span * Math.sqrt(total) };
}

function halves({ members, total, axis }, counts) {
  members.sort((a, b) => channel(a, axis) - channel(b, axis));
  let [cut, before] = [0, 0];
  while (cut < members.length - 1 && (!cut || before + counts[members[cut]] <= total / 2)) before += counts[members[cut++]];
  return [members.slice(0, cut), members.slice(cut)].map((half) => boxOf(half, counts));
}

/** LZW as GIF has it: codes of 9 to 12 bits, a clear code whenever all are used. */
function compress(pixels) {
  const [clear, end, most] = [256, 257, 4096];
  const out = [];
  let [held, bits, width, free] = [0, 0, 9, end + 1];
  const known = new Int16Array(most << 8); // after a code, a byte: the code of both; 0 is none
  const put = (code) => {
    held |= code << bits;
    for (bits += width; bits >= 8; bits -= 8, held >>>= 8) out.push(held & 255);
  };
  put(clear);
  let before = pixels[0];
  for (let i = 1; i < pixels.length; i++) {
    const place = (before << 8) | pixels[i];
    if (known[place]) {
      before = known[place];
      continue;
    }
    put(before);
    if (free === most) {
      put(clear);
      known.fill(0);
      [width, free] = [9, end + 1];
    } else {
      if (free === 1 << width) width++;
      known[place] = free++;
    }
    before = pixels[i];
  }
  put(before);
  if (free === 1 << width && width < 12) width++;
  put(end);
  if (bits) out.push(held & 255);
  return out;
}

/** Data in blocks of at most 255 bytes, each with its length before it; 0 ends them. */
function blocks(data) {
  const parts = [bytes(8)]; // bits of a pixel
  for (let at = 0; at < data.length; at += 255) parts.push(bytes(Math.min(255, data.length - at)), new Uint8Array(data.slice(at, at + 255)));
  return [...parts, bytes(0)];
}
