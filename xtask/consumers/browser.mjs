// A headless Chromium for one page. Node looks for playwright-core in the folder that NODE_MODULES names.
import { createRequire } from 'node:module';
import { join } from 'node:path';

const { chromium } = createRequire(join(process.env.NODE_MODULES, '/'))('playwright-core');
const quiet = ['--disable-background-networking', '--disable-component-update', '--disable-sync'];

export async function withBrowser(work) {
  const browser = await chromium.launch({ executablePath: '/usr/bin/chromium', args: ['--no-sandbox', '--disable-gpu', ...quiet] });
  try {
    const page = await browser.newPage();
    page.on('pageerror', (error) => console.error(error.message));
    await work(page);
  } finally {
    await browser.close();
  }
}
