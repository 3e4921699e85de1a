// The table of functions. Only rows that are seen exist, so that tens of thousands of functions scroll like ten.

const HEAD = 32;
const SMALL = matchMedia('(max-width: 640px)');

// As the style sheet has it: on small screens names stand above numbers.
function rowHeight() {
  return SMALL.matches ? 50 : 28;
}

// Columns: key, heading, what it means, class. Those of lower ranks go where there is little room.
const COLUMNS = [
  ['name', 'Function', 'The function and its module', 'name'],
  ['calls', 'Calls', 'How often it was called', 'number calls'],
  ['total_ns', 'Total', 'Time with what it called; the outermost call only', 'number'],
  ['self_ns', 'Self', 'Time without what it called', 'number'],
  ['avg_ns', 'Mean', 'Mean duration of a call', 'number second'],
  ['p50_ns', 'p50', 'Half of the calls took no longer', 'number fourth third second'],
  ['p99_ns', 'p99', '99 of 100 calls took no longer', 'number second'],
  ['max_ns', 'Max', 'The longest call', 'number fifth third second'],
  ['durations', 'Latency', 'How long calls took, on one scale for all functions', 'latency third second'],
];

class FunctionTable {
  constructor(box) {
    this.box = box;
    this.key = 'total_ns';
    this.isAscending = false;
    this.scale = durationScale(functions.map(({ durations }) => durations));
    this.mostSelf = functions.reduce((most, { self_ns: own }) => Math.max(most, own), 0);
    this.headings = COLUMNS.map(([key, title, meaning, kind]) => {
      const button = element('button', { type: 'button', textContent: title, title: meaning });
      button.addEventListener('click', () => this.sortBy(key));
      return element('th', { className: kind, scope: 'col', role: 'columnheader' }, button);
    });
    this.body = element('tbody', { role: 'rowgroup' });
    this.table = element('table', { role: 'grid', 'aria-labelledby': 'functions-title', 'aria-colcount': COLUMNS.length },
      element('colgroup', {}, ...COLUMNS.map(([, , , kind]) => element('col', { className: kind }))),
      element('thead', { role: 'rowgroup' }, element('tr', { role: 'row' }, ...this.headings)), this.body);
    this.none = element('p', { className: 'none' });
    box.append(this.table, this.none);
    box.addEventListener('scroll', () => this.draw());
    box.addEventListener('keydown', (event) => this.press(event));
    this.body.addEventListener('click', (event) => {
      const row = event.target.closest('tr.row');
      if (row) store.select(Number(row.dataset.index));
    });
    new ResizeObserver(() => this.draw()).observe(box);
    store.follow((changed) => {
      if (changed.has('query')) this.arrange();
      else if (changed.has('selected')) this.reveal();
    });
    this.arrange();
  }

  sortBy(key) {
    this.isAscending = key === this.key ? !this.isAscending : key === 'name';
    this.key = key;
    this.arrange();
  }

  // Who is shown, in which order.
  arrange() {
    const key = this.key === 'durations' ? 'p50_ns' : this.key;
    const sign = this.isAscending ? 1 : -1;
    const compare = key === 'name'
      ? (one, other) => sign * (one.name < other.name ? -1 : one.name > other.name ? 1 : one.index - other.index)
      : (one, other) => sign * ((one[key] ?? -1) - (other[key] ?? -1)) || one.index - other.index;
    this.shown = functions.filter(({ index }) => store.matches === null || store.matches[index] === 1).sort(compare);
    COLUMNS.forEach(([key], at) => {
      this.headings[at].setAttribute('aria-sort', key !== this.key ? 'none' : this.isAscending ? 'ascending' : 'descending');
    });
    this.table.setAttribute('aria-rowcount', this.shown.length + 1);
    this.none.hidden = this.shown.length > 0;
    this.none.textContent = functions.length === 0
      ? 'No function was called while this was recorded.'
      : `No function's name or module has “${store.query}”.`;
    document.getElementById('found').textContent = store.matches === null ? '' : `${formatCount(this.shown.length)} found`;
    this.box.scrollTop = 0;
    this.reveal();
  }

  // Brings the selected row into sight.
  reveal() {
    const at = this.shown.findIndex(({ index }) => index === store.selected);
    if (at >= 0) {
      const [row, room] = [rowHeight(), this.box.clientHeight - HEAD];
      const top = at * row;
      if (top < this.box.scrollTop) this.box.scrollTop = top;
      else if (top + row > this.box.scrollTop + room) this.box.scrollTop = top + row - room;
      this.box.setAttribute('aria-activedescendant', `function-${store.selected}`);
    } else {
      this.box.removeAttribute('aria-activedescendant');
    }
    this.draw();
  }

  // Makes the rows that are seen, and some more, so that scrolling shows no hole.
  draw() {
    const MORE = 6;
    const high = rowHeight();
    const first = Math.max(0, Math.floor(this.box.scrollTop / high) - MORE);
    const last = Math.min(this.shown.length, first + Math.ceil(this.box.clientHeight / high) + 2 * MORE);
    const space = (rows) => element('tr', { 'aria-hidden': 'true' }, element('td', { style: `height:${rows * high}px;padding:0` }));
    const rows = this.shown.slice(first, last).map((known, at) => this.row(known, first + at));
    this.body.replaceChildren(...first > 0 ? [space(first)] : [], ...rows, ...last < this.shown.length ? [space(this.shown.length - last)] : []);
  }

  row(known, at) {
    const cells = COLUMNS.map(([key, , , kind]) => {
      if (key === 'name') {
        return element('td', { className: kind, role: 'gridcell', title: `${known.name}\n${known.module}` }, known.name, element('small', { textContent: known.file }));
      }
      if (key === 'durations') return element('td', { className: kind, role: 'gridcell' }, sparkline(known.durations, this.scale));
      const isTime = key !== 'calls';
      const cell = element('td', {
        className: kind,
        role: 'gridcell',
        textContent: isTime ? formatDuration(known[key]) : formatCount(known[key]),
        title: isTime ? formatExact(known[key]) : `${formatCount(known[key])} calls${known.open > 0 ? `, ${formatCount(known.open)} of them not seen to end` : ''}`,
        'data-value': known[key] ?? '',
      });
      if (key === 'self_ns' && this.mostSelf > 0) {
        cell.classList.add('share');
        cell.style.setProperty('--part', `${(100 * known.self_ns / this.mostSelf).toFixed(1)}%`);
      }
      return cell;
    });
    return element('tr', {
      className: 'row', id: `function-${known.index}`, role: 'row', 'aria-rowindex': at + 2,
      'aria-selected': String(known.index === store.selected), 'data-index': known.index,
    }, ...cells);
  }

  press(event) {
    if (event.target !== this.box || event.ctrlKey || event.metaKey || event.altKey) return;
    const page = Math.max(1, Math.floor((this.box.clientHeight - HEAD) / rowHeight()) - 1);
    const now = this.shown.findIndex(({ index }) => index === store.selected);
    const to = { ArrowDown: now + 1, ArrowUp: now - 1, PageDown: now + page, PageUp: now - page, Home: 0, End: this.shown.length - 1 }[event.key];
    if (to === undefined || this.shown.length === 0) return;
    event.preventDefault();
    store.select(this.shown[Math.max(0, Math.min(this.shown.length - 1, to))].index);
  }
}

// The bins that some functions have, from the first to the last.
function durationScale(all) {
  let [first, last] = [Infinity, -Infinity];
  for (const durations of all) {
    if (durations.length === 0) continue;
    first = Math.min(first, durations[0]);
    last = Math.max(last, durations[durations.length - 2]);
  }
  return first > last ? { first: 0, last: 0 } : { first, last };
}

// How long a function's calls took, small. Heights are roots, so that the few slow calls are seen beside the many.
function sparkline(durations, { first, last }) {
  const [width, height] = [132, 18];
  const step = width / (last - first + 1);
  const most = Math.max(1, ...durations.filter((_, at) => at % 2 === 1));
  let path = '';
  for (let at = 0; at < durations.length; at += 2) {
    const tall = Math.max(1.5, height * Math.sqrt(durations[at + 1] / most));
    path += `M${((durations[at] - first) * step).toFixed(1)} ${height}v${(-tall).toFixed(1)}h${Math.max(1, step - 0.3).toFixed(1)}v${tall.toFixed(1)}z`;
  }
  return svg('svg', { viewBox: `0 0 ${width} ${height + 2}`, 'aria-hidden': 'true' }, svg('path', { d: path }));
}
