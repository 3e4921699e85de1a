// Opens a large page of `trapline html`, and moves its timeline at four scales. Argument: the page. Times are those of Chromium's own trace: from the start of the navigation to the marks that the page
// sets when its functions, and when its timeline are there; and the frames that were drawn while the timeline was dragged.
import { readFileSync } from 'node:fs';
import { withBrowser } from './browser.mjs';

const [path] = process.argv.slice(2);
const CATEGORIES = ['-*', 'blink.user_timing', 'navigation', 'devtools.timeline', 'disabled-by-default-devtools.timeline', 'disabled-by-default-devtools.timeline.frame', 'loading', 'toplevel', 'benchmark', 'cc'];
const OPENED = 5;
const MOVES = 240;

// The events of Chromium's trace of some work.
async function traced(page, work) {
  await page.context().browser().startTracing(page, { categories: CATEGORIES });
  await work();
  return JSON.parse((await page.context().browser().stopTracing()).toString()).traceEvents;
}

const median = (numbers) => numbers.toSorted((one, other) => one - other)[Math.floor(numbers.length / 2)];
const seconds = (microseconds) => (microseconds / 1e6).toFixed(2);
const settled = (page) => page.waitForSelector('#timeline[aria-busy=false]', { timeout: 240_000 });

await withBrowser(async (page) => {
  await page.setViewportSize({ width: 1400, height: 900 });
  const opened = [];
  for (let time = 0; time < OPENED; time++) {
    await page.goto('about:blank');
    const events = await traced(page, async () => {
      await page.goto(`file://${path}`);
      await settled(page);
    });
    const mark = (name) => events.find((event) => event.name === name && event.cat.includes('blink.user_timing'));
    const [functions, timeline] = [mark('trapline-functions'), mark('trapline-timeline')];
    const start = events.filter((event) => event.name === 'navigationStart' && event.ts <= functions.ts).sort((one, other) => other.ts - one.ts)[0];
    opened.push({ functions: functions.ts - start.ts, timeline: timeline.ts - start.ts });
  }
  const facts = JSON.parse(readFileSync(path, 'latin1').match(/id="facts">(.*?)<\/script>/s)[1]);
  const of = (key) => opened.map((one) => one[key]);
  const told = (key) => `${seconds(median(of(key)))} s (${seconds(Math.min(...of(key)))} to ${seconds(Math.max(...of(key)))})`;
  console.log(`calls            ${facts.info.calls.toLocaleString('en-US')}`);
  console.log(`opened, ${OPENED} times  functions and flame graph after ${told('functions')}, timeline after ${told('timeline')}`);

  await page.locator('#timeline').scrollIntoViewIfNeeded();
  await page.focus('#timeline');
  const area = await page.locator('#timeline').boundingBox();
  const [left, right, y] = [area.x + 100, area.x + area.width - 100, area.y + 120];
  for (const zooms of [2, 12, 22, 34]) {
    await page.keyboard.press('0');
    for (let zoom = 0; zoom < zooms; zoom++) await page.keyboard.press('w');
    await page.mouse.move(5, 5);
    await settled(page);
    const shown = (await page.locator('#timeline-status').innerText()).match(/· ([\d.,]+ \S+) shown/)[1];
    const events = await traced(page, async () => {
      await page.mouse.move(left, y);
      await page.mouse.down();
      await page.evaluate(() => performance.mark('drag-begin'));
      for (let move = 0; move < MOVES; move++) {
        // There and back, ever further.
        const way = (move % 60) / 60;
        await page.mouse.move(left + (right - left) * (move % 120 < 60 ? way : 1 - way), y);
      }
      await page.evaluate(() => performance.mark('drag-end'));
      await page.mouse.up();
    });
    const at = (name) => events.find((event) => event.name === name).ts;
    const [begin, end] = [at('drag-begin'), at('drag-end')];
    const during = events.filter(({ ts }) => ts >= begin && ts <= end);
    const drawn = during.filter(({ name }) => name === 'DrawFrame').map(({ ts }) => ts).sort((one, other) => one - other);
    const scripts = during.filter(({ name }) => name === 'FireAnimationFrame');
    const gaps = drawn.slice(1).map((ts, index) => ts - drawn[index]);
    const slow = gaps.toSorted((one, other) => other - one)[Math.floor(gaps.length / 100)] ?? 0;
    const work = scripts.map(({ dur }) => dur ?? 0);
    console.log(`dragged, ${shown.padEnd(10)} shown: ${(drawn.length / ((end - begin) / 1e6)).toFixed(0)} frames a second; 99 of 100 within ${(slow / 1e3).toFixed(0)} ms; a frame takes the page ${(median(work) / 1e3).toFixed(1)} ms`);
  }
});
