// Puts the views together, as soon as what they show was read: the timeline last.

const byId = (id) => document.getElementById(id);

store.follow((changed) => {
  if (changed.has('theme')) palette.paint();
  if (changed.has('selected')) showSelection();
  if (changed.has('theme')) nameTheme();
});

function nameTheme() {
  const other = store.theme === 'dark' ? 'Light' : 'Dark';
  byId('theme').textContent = other;
  byId('theme').setAttribute('aria-label', `Switch to ${other.toLowerCase()} colours`);
}

function listen() {
  const search = byId('search');
  search.addEventListener('input', () => store.search(search.value));
  search.addEventListener('keydown', (event) => {
    if (event.key === 'Enter' || event.key === 'ArrowDown') {
      event.preventDefault();
      byId('table').focus();
    }
  });
  byId('theme').addEventListener('click', switchTheme);
  document.addEventListener('keydown', (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const isWriting = event.target.matches('input, select, textarea');
    if (event.key === 'Escape') {
      if (search.value !== '') {
        search.value = '';
        store.search('');
      } else {
        store.select(null);
      }
      if (isWriting) search.blur();
    } else if (event.key === '/' && !isWriting) {
      event.preventDefault();
      search.focus();
      search.select();
    } else if (event.key.toLowerCase() === 't' && !isWriting) {
      switchTheme();
    }
  });
}

const timeline = new Timeline(byId('timeline'), byId('timeline-tools'), byId('timeline-status'));

async function start() {
  nameTheme();
  showSummary();
  new FunctionTable(byId('table'));
  listen();
  const { count } = facts.stacks;
  const stacks = new Stacks(count, await unpacked(0, 0, facts.stacks.bytes));
  new Details(byId('details'), stacks);
  new Flame(byId('flame'), byId('flame-tools'), byId('flame-status'), stacks);
  performance.mark('trapline-functions');
}

function openTimeline() {
  timeline.open(JSON.parse(byId('blocks').textContent));
  timeline.tell();
}

start();
if (document.readyState === 'loading') document.addEventListener('DOMContentLoaded', openTimeline);
else openTimeline();
