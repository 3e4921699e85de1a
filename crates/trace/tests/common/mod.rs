//! What the tests of the trace file share: a directory that goes away, a small trace, and reading one from bytes.
#![allow(dead_code, reason = "each test uses some of it")]

use std::{
    fs,
    path::{Path, PathBuf},
};

use tempfile::TempDir;
use trapline_trace::{
    Catalog, ClockPoint, Damage, Decoder, EventsChunk, Function, Load, Losses, Meta, Module, Process, Reader, Stream,
    TimedEvent, Writer,
    record::{Event, encode},
};

/// A directory for one test.
pub(crate) struct Directory(TempDir);

impl Directory {
    /// Makes one.
    pub(crate) fn new() -> Self {
        Self(TempDir::new().expect("the directory for temporary files is writable"))
    }

    /// A path in it.
    pub(crate) fn file(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }
}

/// All that a trace holds.
#[derive(Debug)]
pub(crate) struct Content {
    /// What is no event.
    pub(crate) catalog: Catalog,
    /// Chunks of events with their events.
    pub(crate) chunks: Vec<(EventsChunk, Vec<TimedEvent>)>,
    /// What is wrong.
    pub(crate) damage: Damage,
}

/// Reads a whole trace.
pub(crate) fn read(bytes: &[u8]) -> Result<Content, trapline_trace::Error> {
    let mut reader = Reader::new(bytes, Path::new("test.data"))?;
    let (mut catalog, mut decoder, mut chunks) = (Catalog::new(), Decoder::new(), Vec::new());
    while let Some(chunk) = reader.next_chunk()? {
        if let Some(chunk) = catalog.take(chunk) {
            let mut events = Vec::new();
            if decoder.decode(&chunk, &mut events).is_ok() {
                chunks.push((chunk, events));
            } else {
                reader.report_senseless();
            }
        }
    }
    Ok(Content { catalog, chunks, damage: reader.damage().clone() })
}

/// Functions `f0`, `f1`, ...; each seventh is not traced.
pub(crate) fn functions(count: u64) -> Vec<Function> {
    (0..count)
        .map(|index| Function {
            name: format!("f{index}"),
            address: 0x1000 + index * 64,
            size: 60,
            untraced: (index % 7 == 6).then(|| "too-short".into()),
            detail: String::new(),
        })
        .collect()
}

/// What a trace has before its events: a process, a module of 20 functions with the sites 100 to 119, one tick a nanosecond, stream 1.
pub(crate) fn begin(path: &Path) -> Writer {
    let meta = Meta { command: vec!["prog".into()], tsc_hz: 1_000_000_000, ..Meta::default() };
    let mut writer = Writer::create(path, &meta).expect("a trace");
    let functions = functions(20);
    let module =
        Module { id: 5, path: "/bin/prog", build_id: Some(&[0xab, 0x01]), first_site: 100, functions: &functions };
    let process =
        Process { id: 1, pid: 41, command: vec!["prog".into()], executable: "/bin/prog".into(), ..Process::default() };
    writer.process(&process).expect("a process");
    writer.module(&module).expect("a module");
    writer.load(&Load { process: 1, module: 5, bias: 0x5555_0000_0000, tsc: 10 }).expect("a load");
    writer.stream(&Stream { id: 1, process: 1, tid: 41, name: "prog".into(), started_tsc: 10 }).expect("a stream");
    writer.calibration(&[ClockPoint { tsc: 0, monotonic_ns: 1000 }]).expect("a clock");
    writer
}

/// Ends it.
pub(crate) fn finish(mut writer: Writer) {
    writer.calibration(&[ClockPoint { tsc: 1_000_000, monotonic_ns: 1_001_000 }]).expect("a clock");
    writer.losses(&Losses::default()).expect("losses");
    writer.exit(1, Some(0), 1_000_000).expect("an exit");
    writer.finish().expect("the end");
}

/// A trace of one stream with these events, in chunks of `chunk` records.
pub(crate) fn trace(events: &[(u64, Event)], depth: u32, chunk: usize) -> Vec<u8> {
    let directory = Directory::new();
    let path = directory.file("t.data");
    let mut writer = begin(&path);
    let records: Vec<u64> = events.iter().map(|(tsc, event)| encode(*event, *tsc)).collect();
    let (mut tsc, mut depth) = (events.first().map_or(0, |(tsc, _)| *tsc), depth);
    for records in records.chunks(chunk) {
        let end = writer.events(1, tsc, depth, 0, records).expect("events");
        (tsc, depth) = (end.tsc, end.depth);
    }
    finish(writer);
    fs::read(&path).expect("the trace")
}
