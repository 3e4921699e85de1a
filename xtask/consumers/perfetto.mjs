// Has Perfetto's own interface load a trace, and asks its trace processor for calls and time of each function.
// Arguments: the interface's folder, the trace. Prints {"functions": {name: {"calls", "sum_ns"}}, "errors": [..]}.
import { createServer } from 'node:http';
import { existsSync, readFileSync } from 'node:fs';
import { extname, join } from 'node:path';
import { withBrowser } from './browser.mjs';

const [folder, trace] = process.argv.slice(2);
const kinds = { '.html': 'text/html', '.js': 'text/javascript', '.wasm': 'application/wasm', '.css': 'text/css', '.json': 'application/json' };
const server = createServer((request, response) => {
  const path = decodeURIComponent(new URL(request.url, 'http://localhost').pathname);
  const file = path === '/the-trace' ? trace : join(folder, path === '/' ? 'index.html' : path);
  if (!existsSync(file)) {
    response.writeHead(404).end();
    return;
  }
  response.writeHead(200, { 'content-type': kinds[extname(file)] ?? 'application/octet-stream' }).end(readFileSync(file));
});
await new Promise((resolve) => server.listen(0, '127.0.0.1', resolve));
const origin = `http://127.0.0.1:${server.address().port}`;
try {
  await withBrowser(async (page) => {
    await page.goto(`${origin}/#!/?url=${encodeURIComponent(`${origin}/the-trace`)}`);
    await page.waitForFunction(() => globalThis.app?.trace?.engine !== undefined, null, { timeout: 240_000 });
    const found = await page.evaluate(async () => {
      const functions = {};
      const slices = await app.trace.engine.query('select name, count(*) as calls, sum(dur) as time from slice group by name');
      for (const row = slices.iter({}); row.valid(); row.next()) {
        functions[row.get('name')] = { calls: Number(row.get('calls')), sum_ns: Number(row.get('time')) };
      }
      const errors = [];
      const stats = await app.trace.engine.query("select name, value from stats where severity in ('error', 'data_loss') and value > 0");
      for (const row = stats.iter({}); row.valid(); row.next()) {
        errors.push(`${row.get('name')}: ${row.get('value')}`);
      }
      return { functions, errors };
    });
    console.log(JSON.stringify(found));
  });
} finally {
  server.close();
}
