// Colours of functions: a hue for each module, a shade for each of its functions, so that the same function looks the same in all views. Text on them has a contrast of 4.5 at least in either theme.

// OKLCH to sRGB, by Björn Ottosson's matrices.
function rgb(lightness, chroma, hue) {
  const [a, b] = [chroma * Math.cos(hue), chroma * Math.sin(hue)];
  const l = (lightness + 0.3963377774 * a + 0.2158037573 * b) ** 3;
  const m = (lightness - 0.1055613458 * a - 0.0638541728 * b) ** 3;
  const s = (lightness - 0.0894841775 * a - 1.291485548 * b) ** 3;
  const linear = [
    4.0767416621 * l - 3.3077115913 * m + 0.2309699292 * s,
    -1.2684380046 * l + 2.6097574011 * m - 0.3413193965 * s,
    -0.0041960863 * l - 0.7034186147 * m + 1.707614701 * s,
  ];
  return linear.map((value) => {
    const bounded = Math.min(1, Math.max(0, value));
    return Math.round(255 * (bounded <= 0.0031308 ? 12.92 * bounded : 1.055 * bounded ** (1 / 2.4) - 0.055));
  });
}

function hash(text) {
  let value = 2166136261;
  for (let at = 0; at < text.length; at++) value = Math.imul(value ^ text.charCodeAt(at), 16777619);
  return value >>> 0;
}

const palette = {
  // For each function (and the sum of others): CSS colours and pixels, as they are and stepped back.
  fills: [],
  dimFills: [],
  pixels: new Uint32Array(0),
  dimPixels: new Uint32Array(0),
  // Of the theme, as CSS has them.
  text: '',
  quiet: '',
  line: '',
  back: '',
  sunk: '',
  accent: '',

  paint() {
    const isDark = store.theme === 'dark';
    const css = getComputedStyle(document.documentElement);
    const of = (name) => css.getPropertyValue(`--${name}`).trim();
    [this.text, this.quiet, this.line, this.back, this.sunk, this.accent] = ['text', 'quiet', 'line', 'raised', 'sunk', 'accent'].map(of);
    // Modules by their first functions, which is by time: golden angles keep them apart.
    const hues = new Map();
    for (const { module } of functions) if (!hues.has(module)) hues.set(module, 0.9 + hues.size * 2.399963);
    const shade = ({ name, module, isSum }, isDim) => {
      const spread = (hash(name) % 1000) / 1000;
      const hue = (hues.get(module) ?? 0) + 0.9 * (spread - 0.5);
      const [base, range, chroma] = isDark ? [0.42, 0.07, 0.085] : [0.84, 0.07, 0.085];
      if (isDim || isSum) return isDark ? [44, 48, 53] : [228, 228, 222];
      return rgb(base + range * ((hash(name) >>> 10) % 100 / 100 - 0.5), chroma, hue);
    };
    const all = [...functions, others];
    const pixel = ([red, green, blue]) => ((255 << 24) | (blue << 16) | (green << 8) | red) >>> 0;
    const full = all.map((known) => shade(known, false));
    const dim = all.map((known) => shade(known, true));
    this.fills = full.map(([red, green, blue]) => `rgb(${red} ${green} ${blue})`);
    this.dimFills = dim.map(([red, green, blue]) => `rgb(${red} ${green} ${blue})`);
    this.pixels = Uint32Array.from(full, pixel);
    this.dimPixels = Uint32Array.from(dim, pixel);
  },

  fill(index) {
    return (store.isDim(index) ? this.dimFills : this.fills)[Math.min(index, OTHERS)];
  },
};

palette.paint();
