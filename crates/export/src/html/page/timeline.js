// The timeline: a row for each depth of each thread. What a frame costs depends on its pixels, not on how many calls there are: pieces are drawn into memory, row by row, and rows have few pieces to a pixel.

const LANE = 17;
const TITLE = 22;
const GAP = 8;
const AXIS = 26;
// A window is not shorter.
const LEAST_SPAN = 40;

class Timeline {
  constructor(box, tools, status) {
    Object.assign(this, { box, status, pointers: new Map(), hovered: null, thread: null, blocks: null, labels: [] });
    // From the first call to the end of the last one.
    this.start = facts.threads.reduce((start, thread) => Math.min(start, thread.start_ns), Infinity);
    if (this.start === Infinity) this.start = 0;
    this.end = facts.threads.reduce((end, thread) => Math.max(end, thread.end_ns), this.start + LEAST_SPAN);
    [this.from, this.to] = [this.start, this.end];
    this.surface = new Surface(box, (context, top, width, height) => this.paint(context, top, width, height));
    box.tabIndex = 0;
    box.setAttribute('role', 'application');
    box.setAttribute('aria-label', 'Timeline by thread. W and S zoom, A and D move, up and down scroll, 0 shows all of it.');
    box.setAttribute('aria-describedby', status.id);
    this.addTools(tools);
    this.listen();
    this.lay();
    new ResizeObserver(() => this.lay()).observe(box);
    store.follow(() => this.surface.request());
  }

  // Everything was read, and pieces can be found.
  open(directory) {
    this.blocks = new Blocks(directory, () => this.surface.request());
    this.surface.request();
  }

  addTools(tools) {
    const button = (text, name, act) => {
      const made = element('button', { type: 'button', textContent: text, title: name, 'aria-label': name });
      made.addEventListener('click', act);
      return made;
    };
    const MOST = 1000;
    this.select = element('select', { 'aria-label': 'Threads' }, element('option', { value: '', textContent: `All ${facts.threads.length} threads` }),
      ...facts.threads.slice(0, MOST).map((thread, at) => element('option', { value: at, textContent: `${thread.tid} ${thread.name}` })));
    this.select.addEventListener('change', () => {
      this.thread = this.select.value === '' ? null : Number(this.select.value);
      this.box.scrollTop = 0;
      this.lay();
    });
    tools.append(...facts.threads.length > 1 ? [this.select] : [], button('−', 'Zoom out', () => this.zoom(2)), button('+', 'Zoom in', () => this.zoom(0.5)), button('All', 'Show all of it', () => this.show(this.start, this.end)));
  }

  // Where each thread stands.
  lay() {
    this.tracks = [];
    let top = AXIS;
    facts.threads.forEach((thread, index) => {
      if (this.thread !== null && this.thread !== index) return;
      const height = TITLE + thread.depths * LANE + GAP;
      this.tracks.push({ thread, index, top, height });
      top += height;
    });
    this.surface.resize(top);
  }

  // Shows a window of time, as far as there is something.
  show(from, to) {
    const span = Math.min(this.end - this.start, Math.max(LEAST_SPAN, to - from));
    this.from = Math.min(this.end - span, Math.max(this.start, from + (to - from - span) / 2));
    this.to = this.from + span;
    this.surface.request();
    this.tell();
  }

  move(by) {
    const span = this.to - this.from;
    const from = Math.min(this.end - span, Math.max(this.start, this.from + by));
    this.show(from, from + span);
  }

  // Makes the window so many times as long around a moment.
  zoom(by, moment = (this.from + this.to) / 2) {
    const span = Math.min(this.end - this.start, Math.max(LEAST_SPAN, (this.to - this.from) * by));
    const share = (moment - this.from) / (this.to - this.from);
    const from = Math.min(this.end - span, Math.max(this.start, moment - share * span));
    this.show(from, from + span);
  }

  // The moment at a place of the screen.
  moment(clientX) {
    const area = this.box.getBoundingClientRect();
    return this.from + (clientX - area.left - this.box.clientLeft) / this.box.clientWidth * (this.to - this.from);
  }

  listen() {
    const { box, pointers } = this;
    let isMoved = false;
    box.addEventListener('pointerdown', (event) => {
      pointers.set(event.pointerId, { x: event.clientX, start: event.clientX });
      isMoved = pointers.size > 1;
    });
    box.addEventListener('pointermove', (event) => {
      const pointer = pointers.get(event.pointerId);
      if (pointer === undefined) {
        this.hover(this.at(event));
        return;
      }
      if (!isMoved && Math.abs(event.clientX - pointer.start) > 4) {
        isMoved = true;
        box.setPointerCapture(event.pointerId);
        box.classList.add('is-dragged');
      }
      if (isMoved) this.drag(pointer, event.clientX);
    });
    const release = (event) => {
      pointers.delete(event.pointerId);
      box.classList.remove('is-dragged');
    };
    box.addEventListener('pointerup', release);
    box.addEventListener('pointercancel', release);
    box.addEventListener('pointerleave', () => this.hover(null));
    box.addEventListener('click', (event) => {
      const found = isMoved ? null : this.at(event);
      if (found !== null) {
        this.hover(found);
        store.select(found.function);
      }
    });
    box.addEventListener('dblclick', (event) => {
      const found = this.at(event);
      if (found === null) return;
      const margin = (found.end - found.start) * 0.05;
      this.show(found.start - margin, found.end + margin);
    });
    box.addEventListener('wheel', (event) => this.wheel(event), { passive: false });
    box.addEventListener('keydown', (event) => this.key(event));
  }

  // One finger or the mouse moves, two fingers zoom.
  drag(pointer, x) {
    const perPixel = (this.to - this.from) / this.box.clientWidth;
    const other = [...this.pointers.values()].find((one) => one !== pointer);
    if (other === undefined) {
      this.move((pointer.x - x) * perPixel);
    } else {
      const [before, after] = [Math.abs(pointer.x - other.x), Math.abs(x - other.x)];
      if (before > 8 && after > 8) this.zoom(before / after, this.moment(other.x));
    }
    pointer.x = x;
  }

  wheel(event) {
    const LINE = 16;
    const by = event.deltaMode === 1 ? LINE : 1;
    if (event.ctrlKey || event.metaKey) {
      event.preventDefault();
      this.zoom(Math.exp(event.deltaY * by * 0.003), this.moment(event.clientX));
    } else if (event.shiftKey || Math.abs(event.deltaX) > Math.abs(event.deltaY)) {
      event.preventDefault();
      this.move((event.deltaX || event.deltaY) * by * (this.to - this.from) / this.box.clientWidth);
    }
  }

  key(event) {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const span = this.to - this.from;
    const acts = {
      a: () => this.move(-0.15 * span), d: () => this.move(0.15 * span), w: () => this.zoom(0.7), s: () => this.zoom(1 / 0.7),
      arrowleft: () => this.move(-0.15 * span), arrowright: () => this.move(0.15 * span), '+': () => this.zoom(0.7), '=': () => this.zoom(0.7), '-': () => this.zoom(1 / 0.7),
      0: () => this.show(this.start, this.end), home: () => this.show(this.start, this.start + span), end: () => this.show(this.end - span, this.end),
    };
    const act = acts[event.key.toLowerCase()];
    if (act === undefined) return;
    event.preventDefault();
    this.hovered = null;
    act();
  }

  // The piece at a place of the screen: the shortest one within a pixel.
  at(event) {
    if (this.blocks === null) return null;
    const area = this.box.getBoundingClientRect();
    const y = event.clientY - area.top - this.box.clientTop;
    if (y < AXIS) return null;
    const track = this.tracks.find(({ top, height }) => y + this.box.scrollTop >= top && y + this.box.scrollTop < top + height);
    if (track === undefined) return null;
    const depth = Math.floor((y + this.box.scrollTop - track.top - TITLE) / LANE);
    const pixel = (this.to - this.from) / this.box.clientWidth;
    const moment = this.moment(event.clientX);
    let best = null;
    for (const block of this.blocks.within(track.index, this.blocks.stepFor(pixel), moment - pixel, moment + pixel)) {
      const row = block.depths.get(depth);
      if (row === undefined) continue;
      for (let at = firstBehind(block.ends, row, moment - pixel); at < row[1] && block.starts[at] <= moment + pixel; at++) {
        const [start, end] = [block.starts[at], block.ends[at]];
        if (best === null || end - start < best.end - best.start) {
          best = { thread: track.thread, depth, start, end, function: block.functions[at], calls: block.isRun ? block.calls[at] : 1 };
        }
      }
    }
    return best;
  }

  hover(found) {
    this.hovered = found;
    this.box.title = found === null ? '' : functionOf(found.function).name;
    this.tell();
  }

  // Says in words what is seen, or what the pointer is at.
  tell() {
    const { hovered } = this;
    const span = this.to - this.from;
    if (hovered === null) {
      const { first_step: first, steps } = facts;
      const merged = first > 0 ? ` · calls shorter than ${formatDuration(steps[first])} are merged, for there are very many` : '';
      this.status.textContent = `${formatMoment(this.from, span / 100, span)} to ${formatMoment(this.to, span / 100, span)} · ${formatDuration(Math.round(span))} shown${merged}`;
      return;
    }
    const { name, file } = functionOf(hovered.function);
    const many = hovered.calls > 1 ? `${formatCount(hovered.calls)} calls within ${formatDuration(Math.round(hovered.end - hovered.start))}, mostly ` : '';
    const long = hovered.calls > 1 ? '' : ` · ${formatDuration(hovered.end - hovered.start)}`;
    this.status.replaceChildren(many, element('b', { textContent: name }), ` ${file}${long} · at ${formatMoment(hovered.start, span / 1000, span)} · thread ${hovered.thread.tid}`);
  }

  paint(context, top, width, height) {
    if (facts.threads.length === 0) {
      this.surface.say('No thread called a function while this was recorded.');
      return;
    }
    if (this.blocks !== null) {
      this.blocks.begin();
      this.paintPieces(context, top, width, height);
    }
    context.textBaseline = 'middle';
    context.font = '12px system-ui, sans-serif';
    for (const { thread, top: y } of this.tracks) {
      const at = y - top;
      if (at > height || at + TITLE < 0) continue;
      context.fillStyle = palette.quiet;
      context.fillText(`${thread.name} · thread ${thread.tid}${thread.pid === thread.tid ? '' : ` of ${thread.pid}`} · ${formatCount(thread.calls)} calls`, 8, at + TITLE / 2 + 1);
    }
    this.paintAxis(context, width, height);
    this.sayWhetherBusy();
  }

  // Whether all that is to be seen is there; the first time is marked for who measures how long pages take.
  sayWhetherBusy() {
    const isBusy = this.blocks === null || !this.blocks.isIdle;
    this.box.setAttribute('aria-busy', String(isBusy));
    if (isBusy || this.isMarked) return;
    this.isMarked = true;
    performance.mark('trapline-timeline');
  }

  // Pieces go into memory, the first line of each row, which is then copied to the others.
  paintPieces(context, top, width, height) {
    const { surface, labels } = this;
    const { ratio } = surface;
    const [wide, high] = [surface.canvas.width, surface.canvas.height];
    if (this.image?.width !== wide || this.image.height !== high) this.image = new ImageData(wide, high);
    const pixels = new Uint32Array(this.image.data.buffer);
    context.fillStyle = palette.back;
    pixels.fill(toPixel(palette.back));
    labels.length = 0;
    const perPixel = (this.to - this.from) / width;
    const step = this.blocks.stepFor(perPixel);
    const lines = Math.max(1, Math.round((LANE - 1) * ratio));
    for (const track of this.tracks) {
      if (track.top + track.height < top || track.top > top + height) continue;
      const blocks = this.blocks.within(track.index, step, this.from, this.to);
      const first = Math.max(0, Math.floor((top + AXIS - track.top - TITLE) / LANE));
      const last = Math.min(track.thread.depths, Math.ceil((top + height - track.top - TITLE) / LANE));
      for (let depth = first; depth < last; depth++) {
        const y = track.top + TITLE + depth * LANE - top;
        const line = Math.round(y * ratio);
        if (line < 0 || line >= high) continue;
        const row = pixels.subarray(line * wide, (line + 1) * wide);
        for (const block of blocks) {
          const places = block.depths.get(depth);
          if (places !== undefined) this.paintRow(row, block, places, wide, y);
        }
        for (let copy = 1; copy < lines && line + copy < high; copy++) pixels.copyWithin((line + copy) * wide, line * wide, (line + 1) * wide);
      }
    }
    context.putImageData(this.image, 0, 0);
    context.textBaseline = 'middle';
    context.font = `11.5px ${this.mono ??= getComputedStyle(document.documentElement).getPropertyValue('--mono')}`;
    for (const { x, y, room, index } of labels) label(context, functionOf(index).name, x, y + LANE / 2, room, store.isDim(index) ? palette.quiet : palette.text);
  }

  paintRow(row, { starts, ends, functions: which }, places, wide, y) {
    const { from, to, surface, labels } = this;
    const scale = wide / (to - from);
    const { ratio } = surface;
    const isMarked = store.selected !== null || store.matches !== null;
    const begin = firstBehind(ends, places, from);
    for (let at = begin; at < places[1] && starts[at] <= to; at++) {
      const index = which[at];
      const isDim = isMarked && store.isDim(index);
      const left = Math.max(0, Math.floor((starts[at] - from) * scale));
      const right = Math.min(wide, (ends[at] - from) * scale);
      // Neighbours that are wide enough have a line between them.
      const until = right - left > 3 * ratio ? Math.floor(right - ratio) : Math.max(left + 1, Math.floor(right));
      // What is marked is not hidden by what shares its pixel.
      if (isDim && until - left <= 1 && left < wide && this.isMarkedPixel(row[left])) continue;
      row.fill((isDim ? palette.dimPixels : palette.pixels)[index], left, until);
      const room = (until - left) / ratio - 8;
      if (room > 24) labels.push({ x: left / ratio + 4, y, room, index });
    }
  }

  isMarkedPixel(pixel) {
    return pixel !== palette.dimPixels[0] && pixel !== toPixel(palette.back);
  }

  paintAxis(context, width, height) {
    context.fillStyle = palette.sunk;
    context.fillRect(0, 0, width, AXIS - 1);
    context.fillStyle = palette.line;
    context.fillRect(0, AXIS - 1, width, 1);
    const span = this.to - this.from;
    // Marks by ones, twos and fives, some hundred pixels apart.
    const least = span * 110 / width;
    const power = 10 ** Math.floor(Math.log10(least));
    const step = Math.max(1, [1, 2, 5, 10].map((by) => by * power).find((by) => by >= least));
    context.textBaseline = 'middle';
    context.font = '11.5px system-ui, sans-serif';
    for (let at = Math.ceil(this.from / step) * step; at <= this.to; at += step) {
      const x = Math.round((at - this.from) / span * width);
      context.fillStyle = palette.line;
      context.fillRect(x, 0, 1, AXIS);
      context.globalAlpha = 0.5;
      context.fillRect(x, AXIS, 1, height - AXIS);
      context.globalAlpha = 1;
      context.fillStyle = palette.quiet;
      context.fillText(formatMoment(at, step, span), x + 4, AXIS / 2);
    }
  }
}

// A colour of the style sheet, `#rrggbb`, as a pixel.
function toPixel(color) {
  const value = parseInt(color.slice(1), 16);
  return ((255 << 24) | ((value & 0xff) << 16) | (value & 0xff00) | (value >> 16)) >>> 0;
}
