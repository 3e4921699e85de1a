// What was recorded, how much of it, what is missing, and what recording took.

function showSummary() {
  const { info, report } = facts;
  const command = info.command.join(' ');
  document.getElementById('command').textContent = command || 'a recording';
  document.getElementById('command').title = command;
  document.title = `${command.split('/').pop() || 'a recording'} · trapline`;

  const lost = lostRecords(report.lost);
  const figures = [
    ['Calls', formatCount(info.calls), `${formatCount(info.records)} records`],
    ['Duration', formatDuration(info.duration_ns), 'first event to last'],
    ['Functions called', formatCount(functions.length), `${formatCount(info.traced)} of ${formatCount(info.total)} traced`],
    ['Threads', formatCount(info.threads), `${formatCount(info.processes.length)} ${info.processes.length === 1 ? 'process' : 'processes'}`],
    ['Lost', lost === 0 ? 'nothing' : formatCount(lost), lost === 0 ? 'every record is here' : 'records'],
    info.overhead
      ? ['Overhead', formatDuration(info.overhead.total_ns), `about ${(info.overhead.record_ps / 1e3).toFixed(1)} ns a record, over all threads`]
      : ['Overhead', '–', 'the trace does not tell'],
  ];
  document.getElementById('figures').append(...figures.map(([name, value, remark]) =>
    element('div', {}, element('dt', { textContent: name }), element('dd', {}, value, element('small', { textContent: remark })))));

  const warnings = warningsOf(report.lost, lost);
  document.getElementById('warnings').append(...warnings.map((text) => element('p', { className: 'warning', textContent: text })));
  document.getElementById('recording').append(...recording(info, report.lost));
  const started = new Date(info.started_unix_ns / 1e6);
  const day = info.started_unix_ns > 0 ? `, ${started.toISOString().replace('T', ' ').slice(0, 19)} UTC` : '';
  document.getElementById('origin').textContent = `Recorded by trapline ${info.trapline}${info.host ? ` on ${info.host}` : ''}${day}.`;
}

// Records that are missing, whatever the cause: times, bytes and yes or no are none.
function lostRecords(lost) {
  const causes = Object.entries(lost).filter(([cause, count]) => typeof count === 'number' && !/_ns$|_bytes$/.test(cause) && cause !== 'unhooked');
  return causes.reduce((sum, [, count]) => sum + count, 0);
}

function warningsOf(lost, records) {
  const warnings = [];
  if (!lost.finished) warnings.push('The trace has no end: its recorder was killed, or it was cut. What is there is shown.');
  if (lost.damaged_bytes > 0) warnings.push(`The trace is damaged: ${formatCount(lost.damaged_bytes)} bytes were skipped.`);
  if (records > 0) warnings.push(`${formatCount(records)} records were lost while recording. Counts and times are too small by what they would have told; causes are below.`);
  return warnings;
}

function recording(info, lost) {
  const rows = (title, entries) => entries.length === 0 ? [] : [
    element('h3', { textContent: title }),
    element('table', {}, element('tbody', {}, ...entries.map(([name, ...values]) => element('tr', {},
      element('th', { scope: 'row', textContent: name }),
      ...values.map((value) => element('td', typeof value === 'number' ? { className: 'number', textContent: formatCount(value) } : { textContent: value })))))),
  ];
  const machine = [['Command', info.command.join(' ')], ['Host', info.host], ['Kernel', info.kernel], ['Processor', info.cpu], ['trapline', info.trapline]];
  const causes = Object.entries(lost).filter(([, count]) => typeof count === 'number' && count > 0);
  const status = (process) => process.status === null || process.status === undefined ? 'end not seen' : `status ${process.status}`;
  return [
    ...rows('Recording', machine.filter(([, value]) => value)),
    ...rows('What is missing', causes.map(([cause, count]) => [cause.replace(/_ns$/, ', ns').replaceAll('_', ' '), count])),
    ...rows('Functions that are not traced, by reason', Object.entries(info.untraced).sort((one, other) => other[1] - one[1])),
    ...rows('Processes', info.processes.slice(0, 200).map((process) => [String(process.pid), process.command.join(' ') || process.executable, status(process)])),
    ...rows('Modules', info.modules.slice(0, 500).map((module) => [module.path, `${formatCount(module.functions)} functions`])),
  ];
}

// The bar that says what is selected in all views.
function showSelection() {
  const bar = document.getElementById('selection');
  bar.classList.toggle('is-shown', store.selected !== null);
  if (store.selected === null) {
    bar.replaceChildren();
    return;
  }
  const known = functions[store.selected];
  const clear = element('button', { type: 'button', textContent: 'Clear' });
  clear.addEventListener('click', () => store.select(null));
  bar.replaceChildren(
    element('span', { className: 'name', textContent: known.name, title: known.name }),
    element('span', { className: 'numbers', textContent: `${formatCount(known.calls)} calls · ${formatDuration(known.total_ns)} total · ${formatDuration(known.self_ns)} self` }),
    clear,
  );
}
