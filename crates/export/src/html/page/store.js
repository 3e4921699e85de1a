// What is selected and what is searched for: one state that all views follow.

const store = {
  // A function's number, or null.
  selected: null,
  query: '',
  // For each function, whether it matches what is searched for; null if nothing is.
  matches: null,
  listeners: [],

  // Calls `listener` with the names of what has changed: selected, query, theme.
  follow(listener) {
    this.listeners.push(listener);
  },

  tell(...changed) {
    for (const listener of this.listeners) listener(new Set(changed));
  },

  select(index) {
    const selected = index === OTHERS ? null : index;
    if (selected === this.selected) return;
    this.selected = selected;
    this.tell('selected');
  },

  search(query) {
    if (query === this.query) return;
    this.query = query;
    const words = query.toLowerCase().split(/\s+/).filter((word) => word !== '');
    this.matches = words.length === 0 ? null : Uint8Array.from(functions, ({ name, file }) => {
      const text = `${name} ${file}`.toLowerCase();
      return words.every((word) => text.includes(word)) ? 1 : 0;
    });
    this.tell('query');
  },

  // Whether a function steps back behind what is selected, or else searched for.
  isDim(index) {
    if (this.selected !== null) return index !== this.selected;
    return this.matches !== null && this.matches[index] !== 1;
  },

  get theme() {
    return document.documentElement.dataset.theme;
  },

  set theme(theme) {
    document.documentElement.dataset.theme = theme;
    this.tell('theme');
  },
};

// Light or dark: as the system has it, until somebody chooses. Pages from files may have no storage.
const preferred = matchMedia('(prefers-color-scheme: dark)');
const THEME_KEY = 'trapline-theme';

function storedTheme() {
  try {
    return localStorage.getItem(THEME_KEY);
  } catch {
    return null;
  }
}

function switchTheme() {
  store.theme = store.theme === 'dark' ? 'light' : 'dark';
  try {
    localStorage.setItem(THEME_KEY, store.theme);
  } catch {
    // Then it is for this time alone.
  }
}

document.documentElement.dataset.theme = storedTheme() ?? (preferred.matches ? 'dark' : 'light');
preferred.addEventListener('change', () => {
  if (storedTheme() === null) store.theme = preferred.matches ? 'dark' : 'light';
});
