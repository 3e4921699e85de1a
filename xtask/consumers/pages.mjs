// Drives a page of `trapline html` in Chromium as people do: pointer, keys, fingers.
// Arguments: the page, the report's JSON, a page of a trace without calls, and optionally the names of checks. Prints {"checks": [{"name", "failure": text or null}]}.
import { readFileSync } from 'node:fs';
import { contrast, near, parseDuration, same } from './measures.mjs';
import { withBrowser } from './browser.mjs';

const [path, reportPath, emptyPath, ...wanted] = process.argv.slice(2);
const report = JSON.parse(readFileSync(reportPath, 'utf8'));
const DESKTOP = { width: 1400, height: 900 };
const TELEPHONE = { width: 390, height: 844 };

let page;
let requests;
let errors;

async function open(file = path, viewport = DESKTOP) {
  requests = [];
  errors = [];
  await page.setViewportSize(viewport);
  await page.goto(`file://${file}`);
  await page.waitForSelector('#timeline[aria-busy=false], #timeline .empty:not([hidden])', { timeout: 120_000 });
  await page.waitForSelector('#details > *');
}

const text = (selector) => page.locator(selector).first().innerText();
const attribute = (selector, name) => page.locator(selector).first().getAttribute(name);
const settled = () => page.evaluate(() => new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done))));

async function timelineIsThere() {
  await settled();
  await page.waitForSelector('#timeline[aria-busy=false]', { timeout: 60_000 });
  await settled();
}

// A picture of what a canvas shows.
const picture = (id) => page.evaluate((id) => document.querySelector(`#${id} canvas`).toDataURL(), id);

// Rows of the table that exist now: name, selection, and the values of its cells.
const rows = () => page.evaluate(() => [...document.querySelectorAll('#table tr.row')].map((row) => ({
  index: Number(row.dataset.index),
  at: Number(row.getAttribute('aria-rowindex')),
  name: row.querySelector('.name').firstChild.textContent,
  isSelected: row.getAttribute('aria-selected') === 'true',
  values: [...row.querySelectorAll('[data-value]')].map((cell) => (cell.dataset.value === '' ? null : Number(cell.dataset.value))),
})));

// Goes through the whole table by scrolling.
async function allRows() {
  const found = new Map();
  for (let top = 0; ; top += 300) {
    await page.evaluate((top) => { document.getElementById('table').scrollTop = top; }, top);
    await settled();
    for (const row of await rows()) found.set(row.at, row);
    const isEnd = await page.evaluate(() => { const box = document.getElementById('table'); return box.scrollTop + box.clientHeight >= box.scrollHeight - 1; });
    if (isEnd) return [...found.entries()].sort(([one], [other]) => one - other).map(([, row]) => row);
  }
}

// What the pointer finds in a row of a graph: the status texts, from left to right.
async function along(id, y, step = 6) {
  const area = await page.locator(`#${id}`).boundingBox();
  const texts = [];
  for (let x = 2; x < area.width - 2; x += step) {
    await page.mouse.move(area.x + x, area.y + y);
    const now = await text(`#${id}-status`);
    if (texts.at(-1)?.text !== now) texts.push({ text: now, x });
  }
  return texts;
}

const selectedName = () => text('#selection .name');

const checks = {
  // Every number of every function, in the table and for some in the details, and the sums above.
  async numbers() {
    const found = await allRows();
    same(found.length, report.functions.length, 'rows');
    const keys = ['calls', 'total_ns', 'self_ns', 'avg_ns', 'p50_ns', 'p99_ns', 'max_ns'];
    report.functions.forEach((expected, at) => {
      same(found[at].name, expected.name, `name in row ${at}`);
      keys.forEach((key, column) => same(found[at].values[column], expected[key], `${key} of ${expected.name}`));
    });
    const calls = report.functions.reduce((sum, { calls }) => sum + calls, 0);
    same(await text('#figures dd >> nth=0'), new RegExp(`^${calls.toLocaleString('en-US')}\\b`), 'calls above');
    for (const expected of report.functions.slice(0, 4)) {
      await page.fill('#search', expected.name);
      await page.locator('#table tr.row', { hasText: expected.name }).first().click();
      const titles = await page.evaluate(() => [...document.querySelectorAll('#details dl dd')].map((cell) => Number(cell.title.replace(/\D/g, ''))));
      const order = ['calls', 'total_ns', 'self_ns', 'min_ns', 'avg_ns', 'max_ns', 'p50_ns', 'p99_ns', 'sum_ns'];
      const named = report.functions.find(({ name }) => name === expected.name);
      order.forEach((key, column) => same(titles[column], named[key], `${key} of ${expected.name} in the details`));
      const bins = await page.evaluate(() => [...document.querySelectorAll('#details svg .bin title')].map((title) => Number(title.textContent.match(/: ([\d,]+) calls/)[1].replaceAll(',', ''))));
      near(bins.reduce((sum, count) => sum + count, 0), named.calls, 0.5, `histogram of ${expected.name}`);
    }
  },

  // Nothing but the page itself, whatever is done with it.
  async requests() {
    await checks.selection();
    const others = requests.filter((url) => !url.startsWith(`file://${path}`) && !/^(data|blob):/.test(url));
    same(others, [], 'requests');
    const policy = await page.evaluate(async () => {
      const refused = new Promise((done) => document.addEventListener('securitypolicyviolation', ({ effectiveDirective }) => done(effectiveDirective)));
      new Image().src = 'http://127.0.0.1:9/a.png';
      return refused;
    });
    same(policy, 'img-src', 'what the policy refuses');
  },

  async search() {
    const some = report.functions.at(-1).name;
    await page.keyboard.press('/');
    same(await page.evaluate(() => document.activeElement.id), 'search', 'focus');
    await page.keyboard.type(some.toUpperCase());
    const expected = report.functions.filter(({ name, module }) => `${name} ${module.split('/').pop()}`.toLowerCase().includes(some.toLowerCase()));
    same((await allRows()).map(({ name }) => name).sort(), expected.map(({ name }) => name).sort(), 'functions found');
    same(await text('#found'), `${expected.length} found`, 'count');
    await page.fill('#search', 'no function is called like this');
    same((await rows()).length, 0, 'rows of nothing');
    same(await text('#table .none'), /^No function/, 'what is said of nothing');
    await page.keyboard.press('Escape');
    same((await allRows()).length, report.functions.length, 'rows after Escape');
  },

  async sorting() {
    for (const [column, key] of [['Calls', 'calls'], ['Self', 'self_ns'], ['Max', 'max_ns'], ['Function', 'name']]) {
      for (const direction of key === 'name' ? ['ascending', 'descending'] : ['descending', 'ascending']) {
        await page.click(`#table th button:text-is("${column}")`);
        same(await page.locator('#table th', { hasText: column }).first().getAttribute('aria-sort'), direction, `aria-sort of ${column}`);
        const values = (await allRows()).map(({ index }) => report.functions[index][key] ?? -1);
        const sign = direction === 'ascending' ? 1 : -1;
        const isSorted = values.every((value, at) => at === 0 || sign * (value < values[at - 1] ? -1 : value > values[at - 1] ? 1 : 0) >= 0);
        same(isSorted, true, `${column} is ${direction}`);
      }
    }
  },

  // A selection by each view is in all of them.
  async selection() {
    const before = [await picture('flame'), await picture('timeline')];
    const [, second] = await rows();
    await page.click(`#function-${second.index}`);
    await timelineIsThere();
    same(await selectedName(), second.name, 'selected in the table');
    same(await text('#details .name'), second.name, 'details');
    const after = [await picture('flame'), await picture('timeline')];
    same([before[0] === after[0], before[1] === after[1]], [false, false], 'graphs are as before');
    await page.keyboard.press('Escape');
    await timelineIsThere();
    same([await picture('flame'), await picture('timeline')], before, 'graphs after Escape');

    for (const [id, y] of [['flame', 34], ['timeline', 26 + 22 + 8]]) {
      await page.locator(`#${id}`).scrollIntoViewIfNeeded();
      await timelineIsThere();
      const [{ x }] = (await along(id, y, 20)).filter(({ text }) => / · /.test(text) && !/shown/.test(text));
      const area = await page.locator(`#${id}`).boundingBox();
      await page.mouse.click(area.x + x, area.y + y);
      const name = await text(`#${id}-status b`);
      same(await selectedName(), name, `selected in ${id}`);
      same((await rows()).filter(({ isSelected }) => isSelected).map(({ name }) => name), [name], `row of what is selected in ${id}`);
      await page.keyboard.press('Escape');
    }
    await page.click(`#function-${second.index}`);
    const related = page.locator('#details .related button').first();
    const name = await related.locator('.name').innerText();
    await related.click();
    same(await selectedName(), name, 'selected in the details');
  },

  // Widths of the three graphs are the report's times.
  async flame() {
    const times = new Map();
    for (const { name, self_ns: own, total_ns: total, calls } of report.functions) {
      const sum = times.get(name) ?? { own: 0, total: 0, calls: 0, count: 0 };
      times.set(name, { own: sum.own + own, total: sum.total + total, calls: sum.calls + calls, count: sum.count + 1 });
    }
    const read = (status) => {
      const [, amount, share] = status.match(/ · ([\d.,]+ \S+) · ([\d.]+) %/);
      return { name: status.split(' ')[0], ns: parseDuration(amount), share: Number(share) };
    };
    await page.locator('#flame').scrollIntoViewIfNeeded();
    await page.click('[data-value=inverted]');
    const inverted = (await along('flame', 12)).filter(({ text }) => / %/.test(text)).map(({ text }) => read(text));
    same(inverted.length > 2, true, 'functions in the inverted graph');
    for (const { name, ns } of inverted) if (times.get(name)?.count === 1) near(ns, times.get(name).own, 0.01, `time of ${name} itself`);

    await page.click('[data-value=butterfly]');
    await page.waitForSelector('#flame .empty:not([hidden])');
    same(await text('#flame .empty'), /^Select a function/, 'butterfly of nothing');
    const wanted = report.functions.find(({ name, calls }) => times.get(name).count === 1 && calls > 1);
    await page.fill('#search', wanted.name);
    await page.locator('#table tr.row', { hasText: wanted.name }).first().click();
    await page.keyboard.press('Escape');
    await page.fill('#search', '');
    await page.locator('#flame').scrollIntoViewIfNeeded();
    const high = (await page.locator('#flame').boundingBox()).height;
    let isFound = false;
    for (let y = 12; y < high && !isFound; y += 20) {
      const [first] = (await along('flame', y, 300)).filter(({ text }) => / %/.test(text)).map(({ text }) => read(text));
      if (first?.name !== wanted.name || first.share !== 100) continue;
      near(first.ns, wanted.total_ns, 0.01, `time of ${wanted.name} in its butterfly`);
      isFound = true;
    }
    same(isFound, true, `${wanted.name} in its butterfly`);

    await page.click('[data-value=calls]:text-is("Calls")');
    await page.click('[data-value=time]');
    await page.click('[data-value=calls]:text-is("Top down")');
    await page.keyboard.press('Escape');
    const area = await page.locator('#flame').boundingBox();
    const frames = (await along('flame', 32)).filter(({ text }) => / %/.test(text));
    const last = frames.at(-1);
    // Where it was read: a frame may be a pixel wide.
    await page.mouse.dblclick(area.x + last.x, area.y + 32);
    await settled();
    const zoomed = (await along('flame', 32, 200)).map(({ text }) => text.split(' ')[0]);
    same(new Set(zoomed), new Set([last.text.split(' ')[0]]), 'row of what is zoomed');
    await page.click('button:text-is("Reset zoom")');
    same((await along('flame', 32)).filter(({ text }) => / %/.test(text)).length, frames.length, 'frames after the zoom');
  },

  // From all of it to a single call and back: keys, wheel, drag, double click.
  async timeline() {
    await page.locator('#timeline').scrollIntoViewIfNeeded();
    await page.mouse.move(5, 5);
    const span = async () => {
      await timelineIsThere();
      return parseDuration((await text('#timeline-status')).match(/· ([\d.,]+ \S+) shown/)[1]);
    };
    const from = async () => (await text('#timeline-status')).split(' to ')[0];
    const whole = await span();
    await page.focus('#timeline');
    for (let press = 0; press < 6; press++) await page.keyboard.press('w');
    near(await span(), whole * 0.7 ** 6, 0.02, 'span after six zooms');
    const start = await from();
    await page.keyboard.press('d');
    same(await from() === start, false, 'moved by a key');
    const area = await page.locator('#timeline').boundingBox();
    const [middle, row] = [area.x + area.width / 2, area.y + 26 + 22 + 8];
    const beforeDrag = await from();
    await page.mouse.move(middle, row);
    await page.mouse.down();
    await page.mouse.move(middle + 150, row, { steps: 8 });
    await page.mouse.up();
    await page.mouse.move(5, 5);
    same(await from() === beforeDrag, false, 'moved by a drag');
    same(await page.locator('#selection.is-shown').count(), 0, 'selected by a drag');
    const beforeWheel = await span();
    await page.mouse.move(middle, row);
    await page.keyboard.down('Control');
    await page.mouse.wheel(0, -300);
    await page.keyboard.up('Control');
    await page.mouse.move(5, 5);
    same(await span() < beforeWheel, true, 'zoomed by the wheel');
    await page.keyboard.press('0');
    near(await span(), whole, 0.001, 'span of all');

    // A function that was called once is on the timeline for its time.
    const once = report.functions.filter(({ calls, total_ns: total }) => calls === 1 && total > whole / 20);
    const found = [];
    for (const thread of await page.evaluate(() => [...document.querySelectorAll('#timeline-tools option')].slice(1).map(({ value }) => value))) {
      await page.selectOption('#timeline-tools select', thread);
      await timelineIsThere();
      for (let depth = 0; depth < 3; depth++) found.push(...(await along('timeline', 26 + 22 + 8 + 17 * depth, 250)).filter(({ text }) => /thread \d+$/.test(text)));
    }
    await page.selectOption('#timeline-tools select', '');
    const known = found.map(({ text }) => ({ name: text.split(' ')[0], ns: parseDuration(text.match(/ · ([\d.,]+ \S+) · at/)?.[1] ?? '0 ns') }));
    const pairs = known.flatMap((one) => once.filter(({ name }) => name === one.name).map((other) => [one, other]));
    same(pairs.length > 0, true, 'functions that were called once');
    for (const [one, other] of pairs) near(one.ns, other.total_ns, 0.01, `time of ${one.name}`);

    // As deep as it goes, calls are single.
    await page.focus('#timeline');
    for (let press = 0; press < 80; press++) await page.keyboard.press('w');
    same(await span() <= 60, true, 'the shortest span');
    let call = null;
    for (let y = row - area.y; y < area.height - 10 && call === null; y += 17) {
      const single = (await along('timeline', y, 60)).filter(({ text }) => /thread \d+$/.test(text));
      same(single.filter(({ text }) => /calls within/.test(text)), [], 'merged calls');
      if (single.length > 0) call = { x: area.x + single[0].x, y: area.y + y };
    }
    same(call !== null, true, 'there is a call in the middle');
    await page.mouse.dblclick(call.x, call.y);
    await page.mouse.move(5, 5);
    same(await span() > 60, true, 'zoomed to a call');
    await page.click('button[aria-label="Show all of it"]');
    near(await span(), whole, 0.001, 'span of all');
  },

  async keyboard() {
    const seen = [];
    for (let press = 0; press < 40; press++) {
      await page.keyboard.press('Tab');
      seen.push(await page.evaluate(() => document.activeElement.id || document.activeElement.textContent));
    }
    for (const id of ['search', 'theme', 'table', 'flame', 'timeline']) same(seen.includes(id), true, `${id} is reached by Tab`);
    await page.focus('#table');
    const names = [];
    for (const key of ['ArrowDown', 'ArrowDown', 'ArrowUp', 'End', 'Home', 'PageDown']) {
      await page.keyboard.press(key);
      names.push(await selectedName());
    }
    const at = (place) => report.functions.at(place).name;
    same(names.slice(0, 5), [at(0), at(1), at(0), at(-1), at(0)], 'selected by keys');
    const active = await attribute('#table', 'aria-activedescendant');
    same(await page.locator(`#${active}[aria-selected=true]`).count(), 1, 'the active row');
    await page.keyboard.press('Escape');
    await page.focus('#flame');
    await page.keyboard.press('ArrowDown');
    const top = await text('#flame-status b');
    await page.keyboard.press('ArrowDown');
    const below = await text('#flame-status b');
    await page.keyboard.press('ArrowUp');
    same(await text('#flame-status b'), top, 'down and up');
    await page.keyboard.press('ArrowDown');
    await page.keyboard.press(' ');
    same(await selectedName(), below, 'selected by Space');
    await page.keyboard.press('Enter');
    same(await page.locator('button:text-is("Reset zoom")').isDisabled(), false, 'zoomed by Enter');
    await page.keyboard.press('Backspace');
    await page.keyboard.press('Backspace');
    same(await page.locator('button:text-is("Reset zoom")').isDisabled(), true, 'back by Backspace');
    await page.focus('[role=radio][aria-checked=true]');
    await page.keyboard.press('ArrowRight');
    same(await attribute('[data-value=inverted]', 'aria-checked'), 'true', 'the next view by an arrow');
  },

  // The system's colours, the switch, and contrast: of words, and of names on frames.
  async themes() {
    for (const scheme of ['light', 'dark']) {
      await page.emulateMedia({ colorScheme: scheme });
      await open();
      same(await page.evaluate(() => document.documentElement.dataset.theme), scheme, 'theme of the system');
      await page.click('details.more summary');
      same(await contrast(page, ['--text']), [], `${scheme}: contrast below 4.5`);
      await page.click('#table tr.row');
      await timelineIsThere();
      same(await contrast(page, ['--text', '--quiet']), [], `${scheme}: contrast below 4.5 with a selection`);
      await page.click('#theme');
      same(await page.evaluate(() => document.documentElement.dataset.theme), scheme === 'light' ? 'dark' : 'light', 'theme by the switch');
      await page.evaluate(() => localStorage.clear());
    }
    await page.emulateMedia({ colorScheme: 'light' });
  },

  async 'small screen'() {
    await open(path, TELEPHONE);
    same(await page.evaluate(() => document.documentElement.scrollWidth), TELEPHONE.width, 'width of the page');
    const low = await page.evaluate(() => [...document.querySelectorAll('button, input, select')]
      .filter((one) => one.offsetParent !== null && one.getBoundingClientRect().height < 24).map((one) => one.textContent || one.id));
    same(low, [], 'too low for fingers');
    const [first] = await rows();
    const name = await page.locator(`#function-${first.index} .name`).boundingBox();
    same(name.width > 250, true, 'room for names');
    await page.locator(`#function-${first.index}`).scrollIntoViewIfNeeded();
    await page.locator(`#function-${first.index}`).click();
    same(await selectedName(), first.name, 'selected by a finger');
    same(await page.evaluate(() => document.documentElement.scrollWidth), TELEPHONE.width, 'width with a selection');
    same((await allRows()).length, report.functions.length, 'rows');

    // Two fingers apart zoom, one moves.
    await page.locator('#timeline').scrollIntoViewIfNeeded();
    await timelineIsThere();
    const area = await page.locator('#timeline').boundingBox();
    const client = await page.context().newCDPSession(page);
    const touch = (type, ...xs) => client.send('Input.dispatchTouchEvent', { type, touchPoints: xs.map((x, id) => ({ x: area.x + x, y: area.y + 60, id })) });
    const before = await text('#timeline-status');
    await touch('touchStart', 150, 200);
    for (let by = 10; by <= 80; by += 10) await touch('touchMove', 150 - by, 200 + by);
    await touch('touchEnd');
    await timelineIsThere();
    const zoomed = await text('#timeline-status');
    same(zoomed === before, false, 'zoomed by fingers');
    await touch('touchStart', 200);
    for (let by = 10; by <= 80; by += 10) await touch('touchMove', 200 - by);
    await touch('touchEnd');
    await timelineIsThere();
    same(await text('#timeline-status') === zoomed, false, 'moved by a finger');
  },

  // What a screen reader is told.
  async names() {
    const client = await page.context().newCDPSession(page);
    await page.click('#table tr.row');
    const { nodes } = await client.send('Accessibility.getFullAXTree');
    const ofRole = (role) => nodes.filter((node) => !node.ignored && node.role?.value === role);
    for (const role of ['button', 'searchbox', 'combobox', 'radio', 'radiogroup', 'application', 'grid', 'image', 'heading', 'columnheader', 'gridcell']) {
      const found = ofRole(role);
      if (role !== 'combobox') same(found.length > 0, true, `there is a ${role}`);
      if (role !== 'gridcell') same(found.filter((node) => !node.name?.value).length, 0, `${role} without a name`);
    }
    for (const role of ['banner', 'main', 'contentinfo', 'search', 'complementary']) same(ofRole(role).length, 1, `there is one ${role}`);
    same(ofRole('row').length > 3, true, 'rows');
    same(await page.locator('[role=status], [aria-live]').count() >= 3, true, 'what is told when it changes');
    same(await attribute('html', 'lang'), 'en', 'language');
  },

  async 'no calls'() {
    await open(emptyPath);
    same(await text('#table .none'), /^No function was called/, 'the table');
    same(await text('#timeline .empty'), /^No thread/, 'the timeline');
    same(await text('#flame .empty'), /^No calls/, 'the flame graph');
  },
};

const results = [];
await withBrowser(async (fresh) => {
  page = fresh;
  page.setDefaultTimeout(60_000);
  page.on('request', (request) => requests.push(request.url()));
  page.on('pageerror', (error) => errors.push(error.message));
  for (const [name, check] of Object.entries(checks)) {
    if (wanted.length > 0 && !wanted.includes(name)) continue;
    let failure = null;
    try {
      await open();
      await check();
      same(errors, [], 'errors of the page');
    } catch (error) {
      failure = error.message.split('\n')[0];
    }
    results.push({ name, failure });
  }
});
console.log(JSON.stringify({ checks: results }));
