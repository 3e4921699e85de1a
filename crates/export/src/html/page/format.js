// Numbers as people read them. Times are nanoseconds; null is a time that nobody knows.

const WHOLE = new Intl.NumberFormat('en-US', { maximumFractionDigits: 0 });
const UNITS = [[1e9, 's'], [1e6, 'ms'], [1e3, 'µs'], [1, 'ns']];

function formatCount(count) {
  return WHOLE.format(count);
}

// Three or four digits and the unit, as `trapline report` has them.
function formatDuration(ns) {
  if (ns === null || ns === undefined) return '–';
  const [size, unit] = UNITS.find(([size]) => ns >= size) ?? [1, 'ns'];
  const digits = size === 1 ? 0 : size === 1e9 ? 3 : 2;
  return `${(ns / size).toFixed(digits)} ${unit}`;
}

function formatExact(ns) {
  return ns === null || ns === undefined ? 'not known' : `${formatCount(ns)} ns`;
}

// A moment on an axis whose marks are `step` apart: with as many digits as tell two marks apart.
function formatMoment(ns, step, span) {
  const [size, unit] = UNITS.find(([size]) => Math.max(step, span / 2) >= size) ?? [1, 'ns'];
  const digits = Math.max(0, Math.min(9, Math.ceil(-Math.log10(step / size) - 1e-9)));
  return `${(ns / size).toLocaleString('en-US', { minimumFractionDigits: digits, maximumFractionDigits: digits })} ${unit}`;
}

function formatShare(part, whole) {
  return whole > 0 ? `${(100 * part / whole).toFixed(part >= whole * 0.0995 ? 1 : 2)} %` : '–';
}

// An element with properties, attributes (`aria-*`, `data-*`, `role`) and children.
function element(name, properties = {}, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(properties)) {
    if (key.includes('-') || key === 'role' || key === 'for') made.setAttribute(key, value);
    else made[key] = value;
  }
  made.append(...children);
  return made;
}

function svg(name, attributes = {}, ...children) {
  const made = document.createElementNS('http' + '://www.w3.org/2000/svg', name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  made.append(...children);
  return made;
}
