// The selected function: its numbers, how long its calls took, who called it and whom it called.

class Details {
  constructor(box, stacks) {
    this.box = box;
    this.stacks = stacks;
    store.follow((changed) => {
      if (changed.has('selected')) this.draw();
    });
    this.draw();
  }

  draw() {
    if (store.selected === null) {
      const hint = functions.length === 0 ? 'Nothing was called.' : 'Select a function, here or in any view, to see how long its calls took, who called it, and whom it called.';
      this.box.replaceChildren(element('p', { className: 'empty', textContent: hint }));
      return;
    }
    const known = functions[store.selected];
    const numbers = [
      ['Calls', formatCount(known.calls), `${formatCount(known.calls)} calls`],
      ...[['Total', 'total_ns'], ['Self', 'self_ns'], ['Min', 'min_ns'], ['Mean', 'avg_ns'], ['Max', 'max_ns'], ['p50', 'p50_ns'], ['p99', 'p99_ns'], ['Sum', 'sum_ns']]
        .map(([title, key]) => [title, formatDuration(known[key]), formatExact(known[key])]),
    ];
    const list = element('dl', {}, ...numbers.map(([name, value, exact]) =>
      element('div', {}, element('dt', { textContent: name }), element('dd', { textContent: value, title: exact }))));
    const address = known.address > 0 ? ` · 0x${known.address.toString(16)}` : '';
    const open = known.open > 0 ? [element('p', { className: 'module', textContent: `${formatCount(known.open)} of the calls were not seen to end.` })] : [];
    const { callers, callees } = this.stacks.neighbours(store.selected);
    this.box.replaceChildren(
      element('p', { className: 'name', textContent: known.name }),
      element('p', { className: 'module', textContent: known.module + address }),
      list, ...open, histogram(known),
      related('Called by', callers, 'Nobody who was recorded.'),
      related('Calls', callees, 'Nothing that was recorded.'),
    );
    this.box.scrollTop = 0;
  }
}

function related(title, entries, none) {
  const MOST = 8;
  const rows = entries.slice(0, MOST).map(([index, calls, time]) => {
    const name = index === null ? '(nobody who was recorded)' : functionOf(index).name;
    const content = [element('span', { className: 'name', textContent: name }), element('span', { className: 'time', textContent: `${formatCount(calls)} × · ${formatDuration(time)}` })];
    if (index === null || index === OTHERS) return element('p', {}, name, ` · ${formatDuration(time)}`);
    const button = element('button', { type: 'button', title: name, 'aria-label': `${name}: ${formatCount(calls)} calls, ${formatDuration(time)}` }, ...content);
    button.addEventListener('click', () => store.select(index));
    return button;
  });
  const more = entries.length > MOST ? [element('p', { textContent: `and ${formatCount(entries.length - MOST)} more` })] : [];
  return element('div', { className: 'related' }, element('h3', { textContent: title }), ...rows.length > 0 ? rows : [element('p', { textContent: none })], ...more);
}

// Durations by quarters of powers of two, the many beside the few on a scale of roots.
function histogram(known) {
  const { durations } = known;
  if (durations.length === 0) return element('p', { className: 'empty', textContent: 'No duration is known: returns were not recorded.' });
  const [width, height, bottom] = [320, 96, 110];
  const [first, last] = [durations[0] - 1, durations[durations.length - 2] + 1];
  const step = width / (last - first + 1);
  const x = (bin) => (bin - first) * step;
  const counts = durations.filter((_, at) => at % 2 === 1);
  const most = Math.max(...counts);
  const bars = counts.map((count, at) => {
    const bin = durations[2 * at];
    const tall = Math.max(2, height * Math.sqrt(count / most));
    const text = `${formatDuration(binStart(bin))} to ${formatDuration(binStart(bin + 1))}: ${formatCount(count)} calls`;
    return svg('rect', { class: 'bin', x: x(bin) + 0.4, y: bottom - tall, width: Math.max(0.8, step - 0.8), height: tall }, svg('title', {}, text));
  });
  // Where a duration lies among the bins.
  const place = (ns) => {
    if (ns < 1) return x(0);
    const octave = Math.floor(Math.log2(ns));
    return x(1 + 4 * (octave + ns / 2 ** octave - 1));
  };
  const marks = [['p50', known.p50_ns], ['p99', known.p99_ns]].flatMap(([name, ns]) => ns === null ? [] : [
    svg('line', { class: 'mark', x1: place(ns), x2: place(ns), y1: 10, y2: bottom }),
    svg('text', { x: place(ns), y: 7, 'text-anchor': name === 'p50' ? 'end' : 'start', dx: name === 'p50' ? 3 : -3 }, name),
  ]);
  const edges = [[first, 'start'], [(first + last + 1) / 2, 'middle'], [last + 1, 'end']].map(([bin, anchor]) =>
    svg('text', { x: x(bin), y: 124, 'text-anchor': anchor }, formatDuration(Math.round(binStart(Math.round(Math.max(0, bin)))))));
  const label = `Durations of ${known.name}: half take up to ${formatDuration(known.p50_ns)}, 99 of 100 up to ${formatDuration(known.p99_ns)}, the longest ${formatDuration(known.max_ns)}`;
  return svg('svg', { viewBox: `0 0 ${width} 128`, role: 'img', 'aria-label': label },
    svg('line', { x1: 0, x2: width, y1: bottom, y2: bottom }), ...bars, ...marks, ...edges);
}
