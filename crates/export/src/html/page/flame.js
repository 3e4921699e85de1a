// The flame graph: calls from the top down, inverted, or a function between its callers and callees.

const VIEWS = [['calls', 'Top down', 'All calls, from the outermost ones down'], ['inverted', 'Inverted', 'From the functions that ran themselves, up to their callers'], ['butterfly', 'Butterfly', 'Callers above the selected function, callees below it']];
const BOX = 20;
// What is narrower is not drawn, nor is what it calls.
const LEAST_WIDTH = 0.6;

class Flame {
  constructor(box, tools, status, stacks) {
    Object.assign(this, { stacks, status, view: 'calls', weight: 'time', boxes: [], hovered: null, focused: null, zoomed: null });
    this.surface = new Surface(box, (context, top, width, height) => this.paint(context, top, width, height));
    this.box = box;
    box.tabIndex = 0;
    box.setAttribute('role', 'application');
    box.setAttribute('aria-label', 'Flame graph. Arrow keys move, Space selects, Enter zooms, Backspace goes back.');
    box.setAttribute('aria-describedby', status.id);
    this.views = new Choice('View', VIEWS, (view) => this.show({ view }));
    this.weights = new Choice('Width', [['time', 'Time', 'Width is time'], ['calls', 'Calls', 'Width is the number of calls']], (weight) => this.show({ weight }));
    this.back = element('button', { type: 'button', textContent: 'Reset zoom' });
    this.back.addEventListener('click', () => this.zoom(null));
    tools.append(this.views.element, this.weights.element, this.back);
    this.listen();
    new ResizeObserver(() => this.arrange()).observe(box);
    store.follow((changed) => {
      if (changed.has('selected') && this.view === 'butterfly') this.show({});
      else this.surface.request();
    });
    this.show({});
  }

  listen() {
    const { box } = this;
    box.addEventListener('pointermove', (event) => this.hover(this.at(event)));
    box.addEventListener('pointerleave', () => this.hover(null));
    box.addEventListener('click', (event) => {
      const found = this.at(event);
      if (found === null) return;
      this.focused = found.node;
      store.select(found.node.function);
      this.surface.request();
      this.tell();
    });
    box.addEventListener('dblclick', (event) => {
      const found = this.at(event);
      if (found !== null) this.zoom(found.node);
    });
    box.addEventListener('keydown', (event) => this.key(event));
  }

  // Draws another view, or the same one anew.
  show(changes) {
    Object.assign(this, changes, { zoomed: null, focused: null, hovered: null });
    this.views.choose(this.view);
    this.weights.choose(this.weight);
    const { stacks, weight } = this;
    if (this.view === 'butterfly') {
      this.trees = store.selected === null ? null : stacks.butterfly(store.selected, weight);
    } else {
      this.root = this.view === 'calls' ? stacks.topDown(weight) : stacks.inverted(weight);
    }
    this.box.scrollTop = 0;
    this.arrange();
  }

  // Shows a node as wide as all. In a butterfly its function takes the middle.
  zoom(node) {
    if (this.view === 'butterfly') {
      if (node !== null) store.select(node.function);
      return;
    }
    this.zoomed = node === null || node.parent === null ? null : node;
    this.focused = node;
    this.box.scrollTop = 0;
    this.arrange();
  }

  // Where each node is: the zoomed one as wide as all, its parents above it.
  arrange() {
    this.boxes = [];
    this.back.disabled = this.zoomed === null;
    const width = this.box.clientWidth;
    if (this.view === 'butterfly') {
      if (this.trees !== null) this.arrangeButterfly(width);
    } else {
      const parents = [];
      for (let node = this.zoomed?.parent; node; node = node.parent) if (node.function !== null) parents.unshift(node);
      parents.forEach((node, row) => this.boxes.push({ node, x: 0, width, row, isParent: true }));
      const top = this.zoomed ?? this.root;
      if (top.weight > 0) this.place(top, 0, width / top.weight, parents.length + (top.function === null ? -1 : 0), 1);
    }
    const rows = this.boxes.reduce((most, { row }) => Math.max(most, row + 1), 0);
    this.box.style.height = rows === 0 ? '' : `min(${rows * BOX + 8}px, 60vh)`;
    this.surface.resize(rows * BOX + 6);
    this.tell();
  }

  arrangeButterfly(width) {
    const { up, down } = this.trees;
    if (up.weight === 0) return;
    this.place(up, 0, width / up.weight, 0, -1);
    // The function itself is drawn once, above its callees.
    this.boxes.shift();
    this.place(down, 0, width / down.weight, 0, 1);
    const least = this.boxes.reduce((least, { row }) => Math.min(least, row), 0);
    for (const box of this.boxes) box.row -= least;
  }

  place(node, x, scale, row, step) {
    const width = node.weight * scale;
    if (width < LEAST_WIDTH) return;
    if (node.function !== null) this.boxes.push({ node, x, width, row, isParent: false });
    let at = x;
    for (const child of node.tree.childrenOf(node)) {
      if (child.weight * scale < LEAST_WIDTH) break;
      this.place(child, at, scale, row + step, step);
      at += child.weight * scale;
    }
  }

  paint(context, top, width, height) {
    if (this.boxes.length === 0) {
      this.surface.say(this.empty());
      return;
    }
    this.surface.say('');
    context.font = `12px ${getComputedStyle(document.documentElement).getPropertyValue('--mono')}`;
    context.textBaseline = 'middle';
    for (const { node, x, width: wide, row, isParent } of this.boxes) {
      const y = row * BOX + 3 - top;
      if (y + BOX < 0 || y > height) continue;
      context.globalAlpha = isParent ? 0.55 : 1;
      context.fillStyle = palette.fill(node.function);
      context.fillRect(x, y, Math.max(LEAST_WIDTH, wide - (wide > 3 ? 1 : 0)), BOX - 1);
      context.globalAlpha = 1;
      if (wide > 26) label(context, functionOf(node.function).name, x + 5, y + BOX / 2, wide - 10, store.isDim(node.function) ? palette.quiet : palette.text);
      if (node === this.focused || node === this.hovered?.node) {
        context.strokeStyle = palette.text;
        context.lineWidth = node === this.focused ? 2 : 1;
        context.strokeRect(x + 1, y + 0.5, Math.max(1, wide - 3), BOX - 2);
      }
    }
  }

  empty() {
    if (this.stacks.count === 0) return 'No calls were recorded.';
    if (this.view === 'butterfly' && store.selected === null) return 'Select a function to see who calls it, above it, and whom it calls, below it.';
    return 'No time was recorded here: returns were not seen. Choose Calls as width.';
  }

  at(event) {
    const area = this.box.getBoundingClientRect();
    const [x, y] = [event.clientX - area.left - this.box.clientLeft, event.clientY - area.top - this.box.clientTop + this.box.scrollTop - 3];
    const row = Math.floor(y / BOX);
    return this.boxes.find((box) => box.row === row && x >= box.x && x < box.x + Math.max(2, box.width)) ?? null;
  }

  hover(found) {
    if (found?.node === this.hovered?.node) return;
    this.hovered = found;
    this.box.title = found === null ? '' : functionOf(found.node.function).name;
    this.surface.request();
    this.tell();
  }

  // Says in words what the pointer or the keys are at.
  tell() {
    const node = this.hovered?.node ?? this.focused;
    if (!node || node.function === null) {
      const { merged } = facts.stacks;
      this.status.textContent = merged > 0 ? `${formatCount(merged)} of the smallest stacks are added up.` : 'Click selects, double-click zooms.';
      return;
    }
    const whole = this.view === 'butterfly' ? this.trees.down.weight : this.root.weight;
    const amount = this.weight === 'time' ? formatDuration(node.weight) : `${formatCount(node.weight)} calls below`;
    const { name, file } = functionOf(node.function);
    const calls = node.tree.isDown ? ` · ${formatCount(node.calls)} calls` : '';
    this.status.replaceChildren(element('b', { textContent: name }), ` ${file} · ${amount} · ${formatShare(node.weight, whole)}${calls}`);
  }

  key(event) {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const drawn = new Set(this.boxes.map(({ node }) => node));
    const start = this.zoomed ?? (this.view === 'butterfly' ? this.trees?.down : this.root?.children[0]) ?? null;
    const node = this.focused !== null && drawn.has(this.focused) ? this.focused : null;
    const siblings = node?.parent ? node.tree.childrenOf(node.parent).filter((other) => drawn.has(other)) : [];
    const child = () => node.tree.childrenOf(node).find((other) => drawn.has(other));
    const [deeper, higher] = node !== null && !node.tree.isDown && this.view === 'butterfly' ? ['ArrowUp', 'ArrowDown'] : ['ArrowDown', 'ArrowUp'];
    const callers = () => this.view === 'butterfly' && node === this.trees.down && event.key === 'ArrowUp' ? this.trees.up.tree.childrenOf(this.trees.up)[0] : undefined;
    let to;
    if (event.key.startsWith('Arrow')) {
      if (node === null) to = start;
      else if (event.key === deeper) to = child();
      else if (event.key === higher) to = callers() ?? (node.parent === (this.trees?.up ?? null) && !node.tree.isDown ? this.trees.down : node.parent);
      else to = siblings[siblings.indexOf(node) + (event.key === 'ArrowLeft' ? -1 : 1)];
    } else if (event.key === 'Enter' && node !== null) {
      this.zoom(node);
    } else if (event.key === ' ' && node !== null) {
      store.select(node.function);
    } else if (event.key === 'Backspace' && this.zoomed !== null) {
      this.zoom(this.zoomed.parent);
    } else {
      return;
    }
    event.preventDefault();
    if (to && to.function !== null) {
      this.focused = to;
      this.hovered = null;
      const found = this.boxes.find((box) => box.node === to);
      if (found) this.surface.reveal(found.row * BOX, BOX + 6);
      this.surface.request();
      this.tell();
    }
  }
}
