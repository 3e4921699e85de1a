//! The same trace without one call.
//!
//! Owns [`without_one_call`], the negative control's input: everything is read and written again, but for one call that makes no call itself. Invariant: nothing else is different.

use std::path::Path;

use anyhow::{Context, Result};
use trapline_trace::{
    Catalog, Chunk, ClockPoint, Decoder, Function, Meta, Module, Reader, Writer,
    record::{Event, encode},
};

/// Writes the trace, and returns the name of the function whose call is missing.
pub(super) fn without_one_call(input: &Path, output: &Path) -> Result<String> {
    let mut reader = Reader::open(input)?;
    let (mut catalog, mut decoder) = (Catalog::new(), Decoder::new());
    let (mut chunks, mut points) = (Vec::new(), Vec::<ClockPoint>::new());
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
    // Whoever tells times alone has to see it as well, so it is the longest one.
    let leaves = chunks.iter().enumerate().flat_map(|(chunk, (_, events))| {
        events.windows(2).enumerate().filter_map(move |(at, two)| match (two[0].event, two[1].event) {
            (Event::Enter { site }, Event::Exit { .. }) => {
                Some((two[1].tsc.saturating_sub(two[0].tsc), chunk, at, site))
            }
            _ => None,
        })
    });
    let (_, chunk, at, site) = leaves.max().context("no call makes no call itself")?;
    chunks[chunk].1.drain(at..at + 2);
    let mut writer = Writer::create(output, &catalog.meta.clone().unwrap_or_else(Meta::default))?;
    writer.calibration(&points)?;
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
    for (chunk, events) in &chunks {
        let records: Vec<u64> = events.iter().map(|timed| encode(timed.event, timed.tsc)).collect();
        writer.events(chunk.stream, chunk.first_tsc, chunk.depth, chunk.lost_before, &records)?;
    }
    writer.finish()?;
    Ok(catalog.function(site).name())
}
