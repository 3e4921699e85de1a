// The data of the page: facts as JSON, and bytes in base64 that are unpacked when somebody wants to see what they hold.

const VERSION = 1;
const facts = JSON.parse(document.getElementById('facts').textContent);
if (facts.version !== VERSION) throw new Error(`the data has version ${facts.version}, the page knows ${VERSION}`);

// By the numbers by which stacks and the timeline know them. Behind the last one: functions of stacks that were added up.
const functions = facts.report.functions.map((known, index) => ({
  ...known,
  index,
  file: known.module.split('/').pop(),
  // Bins and counts in turn.
  durations: facts.durations[index],
}));
const OTHERS = functions.length;
const others = { index: OTHERS, name: '(smaller stacks, added up)', module: '', file: '', durations: [], isSum: true };

function functionOf(index) {
  return functions[index] ?? others;
}

const durationNs = facts.info.duration_ns;

// Where a bin of durations begins; see `binned` in the exporter.
function binStart(bin) {
  if (bin === 0) return 0;
  return 2 ** Math.floor((bin - 1) / 4) * (1 + ((bin - 1) % 4) / 4);
}

function fromBase64(text) {
  if (Uint8Array.fromBase64) return Uint8Array.fromBase64(text);
  const binary = atob(text);
  const bytes = new Uint8Array(binary.length);
  for (let at = 0; at < bytes.length; at++) bytes[at] = binary.charCodeAt(at);
  return bytes;
}

// The text of the pages that were read last, for blocks lie beside each other.
const texts = new Map();
const TEXTS = 6;

function textOf(page) {
  let text = texts.get(page);
  texts.delete(page);
  text ??= document.getElementById(`data-${page}`).textContent;
  texts.set(page, text);
  if (texts.size > TEXTS) texts.delete(texts.keys().next().value);
  return text;
}

async function unpacked(page, offset, length) {
  const from = offset / 3 * 4;
  const text = textOf(page).slice(from, from + Math.ceil(length / 3) * 4);
  const bytes = fromBase64(text).subarray(0, length);
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream('deflate-raw'));
  return new Uint8Array(await new Response(stream).arrayBuffer());
}

// Reads numbers of seven bits a byte, the lowest first.
class Numbers {
  constructor(bytes) {
    this.bytes = bytes;
    this.at = 0;
  }

  next() {
    let byte = this.bytes[this.at++];
    let value = byte & 0x7f;
    for (let scale = 128; byte & 0x80; scale *= 128) {
      byte = this.bytes[this.at++];
      value += (byte & 0x7f) * scale;
    }
    return value;
  }
}
