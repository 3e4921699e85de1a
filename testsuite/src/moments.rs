//! When functions were called, to the tick: what no verb prints.
//!
//! Owns [`Moments`]. The times are the processor's own, so that they can be compared with those that a program noted itself.

use std::{collections::BTreeMap, path::Path};

use trapline_trace::{Catalog, Decoder, Reader, TimedEvent, record::Event};

/// The calls of a trace, by thread.
#[derive(Clone, Debug, Default)]
pub struct Moments {
    /// For each thread, when it called what, in its order: time-stamp counter and the function's site.
    pub calls: BTreeMap<u32, Vec<(u64, u32)>>,
    /// The function of each site.
    pub names: BTreeMap<u32, String>,
    /// Whether the recorder had ended the trace.
    pub is_finished: bool,
}

impl Moments {
    /// Reads the calls of the functions whose names `is_wanted`.
    ///
    /// # Errors
    /// The trace cannot be read, or is damaged otherwise than by its end.
    pub fn read(trace: &Path, is_wanted: impl Fn(&str) -> bool) -> Result<Self, String> {
        let mut reader = Reader::open(trace).map_err(|error| error.to_string())?;
        let (mut catalog, mut decoder, mut events) = (Catalog::new(), Decoder::new(), Vec::new());
        let mut moments = Self::default();
        while let Some(chunk) = reader.next_chunk().map_err(|error| error.to_string())? {
            let Some(chunk) = catalog.take(chunk) else { continue };
            events.clear();
            decoder.decode(&chunk, &mut events).map_err(|_| "events make no sense".to_owned())?;
            let tid = catalog.streams.get(&chunk.stream).map_or(0, |stream| stream.tid);
            let calls = moments.calls.entry(tid).or_default();
            calls.extend(events.iter().filter_map(call).filter(|&(_, site)| is_wanted(&catalog.function(site).name())));
        }
        for site in moments.calls.values().flatten().map(|&(_, site)| site) {
            moments.names.entry(site).or_insert_with(|| catalog.function(site).name());
        }
        moments.is_finished = reader.damage().is_finished;
        Ok(moments)
    }
}

fn call(timed: &TimedEvent) -> Option<(u64, u32)> {
    match timed.event {
        Event::Enter { site } | Event::Tail { site } | Event::Point { site } => Some((timed.tsc, site)),
        _ => None,
    }
}
