// The pieces of the timeline: found by time, unpacked when they come into sight, forgotten when there are too many.
//
// The exporter's ladder has steps, durations from 0 on. A call is in the `calls` of the longest step that it is not shorter than. The `runs` of a step are the calls that are shorter than the step, merged
// with their neighbours. So what a window shows at a step are its runs, and the calls of this and all longer steps.

const FIELDS = 9;
// Pieces in memory, of 24 bytes each, beside those that are seen.
const MOST_PIECES = 3_000_000;
const AT_ONCE = 4;

class Blocks {
  // `loaded` is called when more can be seen.
  constructor(directory, loaded) {
    Object.assign(this, { loaded, waiting: [], loading: 0, pieces: 0, frame: 0 });
    this.inMemory = new Set();
    // For each thread and step: calls, and runs.
    this.threads = facts.threads.map(() => facts.steps.map(() => [[], []]));
    for (let at = 0; at < directory.length; at += FIELDS) {
      const [thread, step, isRun, start, end, count, page, offset, length] = directory.slice(at, at + FIELDS);
      const unit = isRun === 1 ? facts.steps[step] / 8 : 1;
      this.threads[thread][step][isRun].push({ start, end, count, page, offset, length, unit, isRun: isRun === 1, block: null, isWanted: false, seen: -1 });
    }
  }

  // The step whose pieces are not much smaller than so many nanoseconds, a pixel.
  stepFor(pixelNs) {
    let step = facts.first_step;
    while (step + 1 < facts.steps.length && facts.steps[step + 1] <= pixelNs) step++;
    return step;
  }

  // Blocks of a thread within a window, as far as they are there; what is missing is fetched. What is drawn later is finer.
  within(thread, step, from, to) {
    const steps = this.threads[thread];
    const found = [];
    let isComplete = true;
    const take = (entries, isNeeded) => {
      for (const entry of entries) {
        if (entry.end < from || entry.start > to) continue;
        if (entry.block !== null) {
          entry.seen = this.frame;
          found.push(entry.block);
        } else if (isNeeded) {
          isComplete = false;
          this.want(entry);
        }
      }
    };
    for (let longer = steps.length - 1; longer >= step; longer--) take(steps[longer][0], true);
    take(steps[step][1], true);
    if (isComplete) return found;
    const finer = found.splice(0);
    for (let longer = steps.length - 1; longer > step; longer--) take(steps[longer][1], false);
    return [...found, ...finer];
  }

  // A frame begins: what was not seen in the last one may be forgotten, and is not worth waiting for.
  begin() {
    this.frame++;
    for (const entry of this.waiting) entry.isWanted = false;
    this.waiting = [];
    if (this.pieces <= MOST_PIECES) return;
    const unseen = [...this.inMemory].filter((entry) => entry.seen < this.frame - 2).sort((one, other) => one.seen - other.seen);
    for (const entry of unseen) {
      if (this.pieces <= MOST_PIECES * 0.8) break;
      this.pieces -= entry.count;
      entry.block = null;
      this.inMemory.delete(entry);
    }
  }

  want(entry) {
    if (entry.isWanted) return;
    entry.isWanted = true;
    this.waiting.push(entry);
    this.next();
  }

  next() {
    while (this.loading < AT_ONCE && this.waiting.length > 0) {
      const entry = this.waiting.shift();
      this.loading++;
      unpacked(entry.page, entry.offset, entry.length).then((bytes) => {
        entry.block = decoded(bytes, entry);
        entry.seen = this.frame;
        this.pieces += entry.count;
        this.inMemory.add(entry);
      }).finally(() => {
        this.loading--;
        entry.isWanted = false;
        this.next();
        this.loaded();
      });
    }
  }

  // Nothing is on its way.
  get isIdle() {
    return this.loading === 0 && this.waiting.length === 0;
  }
}

// A block's columns; see `block.rs`. Pieces of a depth lie between two places, in the order of time.
function decoded(bytes, { start, count, unit, isRun }) {
  const numbers = new Numbers(bytes);
  const rows = Array.from({ length: numbers.next() }, () => [numbers.next(), numbers.next()]);
  const [starts, ends] = [new Float64Array(count), new Float64Array(count)];
  const [which, calls] = [new Uint32Array(count), isRun ? new Uint32Array(count) : null];
  for (let at = 0; at < count; at++) starts[at] = numbers.next();
  for (let at = 0; at < count; at++) ends[at] = numbers.next();
  for (let at = 0; at < count; at++) which[at] = numbers.next();
  if (isRun) for (let at = 0; at < count; at++) calls[at] = numbers.next();
  const origin = Math.floor(start / unit) * unit;
  const depths = new Map();
  let [depth, first] = [0, 0];
  for (const [below, length] of rows) {
    depth += below;
    let now = origin;
    for (let at = first; at < first + length; at++) {
      starts[at] = now + starts[at] * unit;
      now = ends[at] = starts[at] + ends[at] * unit;
    }
    depths.set(depth, [first, first + length]);
    first += length;
  }
  return { isRun, starts, ends, functions: which, calls, depths };
}

// The first piece of some that ends behind a moment.
function firstBehind(ends, [from, to], moment) {
  while (from < to) {
    const middle = (from + to) >> 1;
    if (ends[middle] < moment) from = middle + 1;
    else to = middle;
  }
  return from;
}
