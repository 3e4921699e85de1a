// Takes the pictures of a page of `trapline html` that the manual shows.
// Arguments: the page, the folder for the pictures, and a function to select.
import { join } from 'node:path';
import { withBrowser } from './browser.mjs';

const [path, folder, wanted] = process.argv.slice(2);

await withBrowser(async (page) => {
  const settled = () => page.evaluate(() => new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done))));

  async function take(name, { scheme = 'light', width = 1440, height = 900 }) {
    await page.emulateMedia({ colorScheme: scheme });
    await page.setViewportSize({ width, height });
    await page.goto(`file://${path}`);
    await page.waitForSelector('#timeline[aria-busy=false]', { timeout: 120_000 });
    await page.fill('#search', wanted);
    await page.locator('#table tr.row', { hasText: wanted }).first().click();
    await page.fill('#search', '');
    await settled();
    await page.waitForSelector('#timeline[aria-busy=false]');
    await settled();
    await page.screenshot({ path: join(folder, `${name}.png`) });
  }

  await take('html-light', {});
  await take('html-dark', { scheme: 'dark' });
  await take('html-small', { width: 390, height: 844 });
});
