//! The same trace without one call, and as another machine's.
//!
//! Owns [`without_one_call`], the negative control's input, and [`as_of`], for data sets of several machines and days: everything is read and written again, but for one call that makes no
//! call itself, or but for what the trace says of its origin. Invariant: nothing else is different.

use std::path::Path;

use anyhow::{Context, Result};
use trapline_trace::{
    Catalog, Chunk, ClockPoint, Decoder, EventsChunk, Function, Meta, Module, Reader, TimedEvent, Writer,
    record::{Event, encode},
};

/// Writes the trace, and returns the name of the function whose call is missing.
pub(super) fn without_one_call(input: &Path, output: &Path) -> Result<String> {
    let mut trace = Trace::read(input)?;
    // Whoever tells times alone has to see it as well, so it is the longest one.
    let leaves = trace.chunks.iter().enumerate().flat_map(|(chunk, (_, events))| {
        events.windows(2).enumerate().filter_map(move |(at, two)| match (two[0].event, two[1].event) {
            (Event::Enter { site }, Event::Exit { .. }) => {
                Some((two[1].tsc.saturating_sub(two[0].tsc), chunk, at, site))
            }
            _ => None,
        })
    });
    let (_, chunk, at, site) = leaves.max().context("no call makes no call itself")?;
    trace.chunks[chunk].1.drain(at..at + 2);
    trace.write(output)?;
    Ok(trace.catalog.function(site).name())
}

/// Writes the trace as that machine would have recorded it then.
pub(super) fn as_of(input: &Path, output: &Path, host: &str, started_unix_ns: u64) -> Result<()> {
    let mut trace = Trace::read(input)?;
    let meta = trace.catalog.meta.take().unwrap_or_default();
    trace.catalog.meta = Some(Meta { host: host.to_owned(), started_unix_ns, ..meta });
    trace.write(output)
}

/// All of a trace.
struct Trace {
    catalog: Catalog,
    points: Vec<ClockPoint>,
    chunks: Vec<(EventsChunk, Vec<TimedEvent>)>,
}

impl Trace {
    fn read(input: &Path) -> Result<Self> {
        let mut reader = Reader::open(input)?;
        let (mut catalog, mut decoder) = (Catalog::new(), Decoder::new());
        let (mut chunks, mut points) = (Vec::new(), Vec::new());
        while let Some(chunk) = reader.next_chunk()? {
            if let Chunk::Calibration(more) = &chunk {
                points.extend(more);
            }
            if let Some(chunk) = catalog.take(chunk) {
                let mut events = Vec::new();
                decoder.decode(&chunk, &mut events).ok().context("a chunk makes no sense")?;
                chunks.push((chunk, events));
            }
        }
        Ok(Self { catalog, points, chunks })
    }

    fn write(&self, output: &Path) -> Result<()> {
        let catalog = &self.catalog;
        let mut writer = Writer::create(output, &catalog.meta.clone().unwrap_or_default())?;
        writer.calibration(&self.points)?;
        for process in catalog.processes.values() {
            writer.process(process)?;
        }
        for module in catalog.modules.values() {
            let own = catalog.functions().filter(|found| found.module.is_some_and(|other| other.id == module.id));
            let functions: Vec<Function> = own.filter_map(|found| found.function.cloned()).collect();
            let (id, first_site) = (module.id, module.first_site);
            writer.module(&Module { id, path: &module.path, build_id: None, first_site, functions: &functions })?;
        }
        for stream in catalog.streams.values() {
            writer.stream(stream)?;
        }
        for (chunk, events) in &self.chunks {
            let records: Vec<u64> = events.iter().map(|timed| encode(timed.event, timed.tsc)).collect();
            writer.events(chunk.stream, chunk.first_tsc, chunk.depth, chunk.lost_before, &records)?;
        }
        writer.finish().map_err(Into::into).map(drop)
    }
}
