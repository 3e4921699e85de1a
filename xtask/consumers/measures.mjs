// What checks of a page are made of: comparisons that say what they compared, durations as the page writes them, and contrast.
import { isDeepStrictEqual } from 'node:util';

export function same(found, expected, what) {
  const isSame = expected instanceof RegExp ? expected.test(found) : isDeepStrictEqual(found, expected);
  const told = (value) => (value instanceof RegExp ? String(value) : value instanceof Set ? JSON.stringify([...value]) : JSON.stringify(value)).slice(0, 200);
  if (!isSame) throw new Error(`${what}: ${told(found)}, expected ${told(expected)}`);
}

export function near(found, expected, tolerance, what) {
  if (!(Math.abs(found - expected) <= Math.max(tolerance * Math.abs(expected), 2))) throw new Error(`${what}: ${found}, expected ${expected}`);
}

// `1.25 ms` in nanoseconds.
export function parseDuration(text) {
  const [number, unit] = text.replaceAll(',', '').split(/\s/u);
  return Number(number) * { ns: 1, 'µs': 1e3, ms: 1e6, s: 1e9 }[unit];
}

// Words whose contrast with what is behind them is below 4.5 (WCAG 2.2, level AA), and names on frames likewise: those have one of some colours of the style sheet.
export function contrast(page, colors) {
  return page.evaluate((colors) => {
    const numbers = (color) => (color.match(/[\d.]+/g) ?? []).map(Number);
    const luminance = ([red, green, blue]) => {
      const [r, g, b] = [red, green, blue].map((value) => (value / 255 <= 0.04045 ? value / 255 / 12.92 : ((value / 255 + 0.055) / 1.055) ** 2.4));
      return 0.2126 * r + 0.7152 * g + 0.0722 * b;
    };
    const ratio = (one, other) => {
      const [low, high] = [luminance(one), luminance(other)].sort((one, other) => one - other);
      return (high + 0.05) / (low + 0.05);
    };
    const behind = (node) => {
      for (let at = node; at; at = at.parentElement) {
        const color = numbers(getComputedStyle(at).backgroundColor);
        if (color.length === 3 || color[3] > 0) return color;
      }
      return [255, 255, 255];
    };
    const low = [];
    for (const node of document.querySelectorAll('body *')) {
      const hasWords = [...node.childNodes].some((child) => child.nodeType === 3 && child.textContent.trim() !== '');
      if (!hasWords || node.disabled || node.offsetParent === null || node.closest('script, svg, .hidden')) continue;
      const found = ratio(numbers(getComputedStyle(node).color), behind(node));
      if (found < 4.5) low.push(`${node.tagName} ${node.className} ${found.toFixed(2)}`);
    }
    // Frames: any colour that covers some area, beside the words' colours.
    const css = getComputedStyle(document.documentElement);
    const hex = (name) => numbers(`${[1, 3, 5].map((at) => parseInt(css.getPropertyValue(name).trim().slice(at, at + 2), 16))}`);
    const canvas = document.querySelector('#flame canvas');
    const { data } = canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height);
    const areas = new Map();
    for (let at = 0; at < data.length; at += 4) {
      const key = `${data[at]},${data[at + 1]},${data[at + 2]}`;
      areas.set(key, (areas.get(key) ?? 0) + 1);
    }
    for (const [key, area] of areas) {
      const color = key.split(',').map(Number);
      if (area > 2000 && Math.max(...colors.map((name) => ratio(hex(name), color))) < 4.5) low.push(`frame ${key}`);
    }
    return low;
  }, colors);
}
