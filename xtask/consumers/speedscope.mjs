// Has speedscope import a file, and export what it understood: the profile that it holds, which is read here.
// Arguments: speedscope's folder, the file. Prints {"functions": {name: {"calls", "sum_ns"} or {"total_ns"}}}.
import { readFileSync } from 'node:fs';
import { withBrowser } from './browser.mjs';

const [folder, file] = process.argv.slice(2);
const nanoseconds = { nanoseconds: 1, microseconds: 1e3, milliseconds: 1e6, seconds: 1e9, none: 1 };

await withBrowser(async (page) => {
  page.on('dialog', (dialog) => {
    console.error(dialog.message());
    dialog.dismiss();
  });
  await page.goto(`file://${folder}/index.html`);
  await page.setInputFiles('input[type=file]', file);
  await page.waitForFunction(() => document.body.innerText.includes('Sandwich'), null, { timeout: 240_000 });
  const [download] = await Promise.all([page.waitForEvent('download', { timeout: 240_000 }), page.keyboard.press('Control+s')]);
  const { profiles, shared } = JSON.parse(readFileSync(await download.path(), 'utf8'));
  const functions = {};
  for (const profile of profiles) {
    const scale = nanoseconds[profile.unit];
    if (profile.type === 'evented') {
      const open = [];
      for (const { type, frame, at } of profile.events) {
        if (type === 'O') {
          open.push(at);
          continue;
        }
        const sum = (functions[shared.frames[frame].name] ??= { calls: 0, sum_ns: 0 });
        sum.calls += 1;
        sum.sum_ns += (at - open.pop()) * scale;
      }
    } else {
      profile.samples.forEach((stack, index) => {
        for (const frame of new Set(stack)) {
          const sum = (functions[shared.frames[frame].name] ??= { total_ns: 0 });
          sum.total_ns += profile.weights[index] * scale;
        }
      });
    }
  }
  console.log(JSON.stringify({ functions }));
});
