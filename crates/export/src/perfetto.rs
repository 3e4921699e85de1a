//! Perfetto's protobuf: a track a thread, a slice a call.
//!
//! Owns the messages, as far as they are needed, and [`Perfetto`]. A thread is a packet sequence of its own, whose defaults name its track and whose interned strings are
//! its functions, so that an event is some twenty bytes. Field numbers are those of Perfetto's `protos/perfetto/trace`. Invariant: within a sequence, a
//! name's packet is before, or is, the first one that uses it.

use std::{
    collections::{HashMap, HashSet},
    io::{self, Write},
};

use prost::Message;

use crate::{
    source::{Call, Enter, Output, Thread, Trace},
    target::Stream,
};

/// `SEQ_INCREMENTAL_STATE_CLEARED` and `SEQ_NEEDS_INCREMENTAL_STATE`.
const STATE_BEGINS: u32 = 1;
const STATE_NEEDED: u32 = 2;

/// `TrackEvent.Type`.
const SLICE_BEGIN: i32 = 1;
const SLICE_END: i32 = 2;
const INSTANT: i32 = 3;

/// The field `packet` of the message `Trace`, as a protobuf key.
const PACKET_KEY: u8 = 1 << 3 | 2;

#[derive(Clone, PartialEq, Message)]
struct Packet {
    #[prost(uint64, optional, tag = "8")]
    timestamp: Option<u64>,
    #[prost(uint32, optional, tag = "10")]
    sequence: Option<u32>,
    #[prost(message, optional, tag = "11")]
    event: Option<Event>,
    #[prost(message, optional, tag = "12")]
    interned: Option<Interned>,
    #[prost(uint32, optional, tag = "13")]
    sequence_flags: Option<u32>,
    #[prost(message, optional, tag = "59")]
    defaults: Option<Defaults>,
    #[prost(message, optional, tag = "60")]
    track: Option<Track>,
    #[prost(bool, optional, tag = "87")]
    is_first: Option<bool>,
}

#[derive(Clone, PartialEq, Message)]
struct Event {
    #[prost(uint64, repeated, packed = "false", tag = "3")]
    categories: Vec<u64>,
    #[prost(int32, optional, tag = "9")]
    kind: Option<i32>,
    #[prost(uint64, optional, tag = "10")]
    name: Option<u64>,
}

#[derive(Clone, PartialEq, Message)]
struct Interned {
    #[prost(message, repeated, tag = "1")]
    categories: Vec<Name>,
    #[prost(message, repeated, tag = "2")]
    names: Vec<Name>,
}

#[derive(Clone, PartialEq, Message)]
struct Name {
    #[prost(uint64, optional, tag = "1")]
    id: Option<u64>,
    #[prost(string, optional, tag = "2")]
    name: Option<String>,
}

#[derive(Clone, PartialEq, Message)]
struct Defaults {
    #[prost(message, optional, tag = "11")]
    event: Option<EventDefaults>,
}

#[derive(Clone, PartialEq, Message)]
struct EventDefaults {
    #[prost(uint64, optional, tag = "11")]
    track: Option<u64>,
}

#[derive(Clone, PartialEq, Message)]
struct Track {
    #[prost(uint64, optional, tag = "1")]
    uuid: Option<u64>,
    #[prost(message, optional, tag = "3")]
    process: Option<ProcessTrack>,
    #[prost(message, optional, tag = "4")]
    thread: Option<ThreadTrack>,
    #[prost(uint64, optional, tag = "5")]
    parent: Option<u64>,
}

#[derive(Clone, PartialEq, Message)]
struct ProcessTrack {
    #[prost(int32, optional, tag = "1")]
    pid: Option<i32>,
    #[prost(string, repeated, tag = "2")]
    command: Vec<String>,
    #[prost(string, optional, tag = "6")]
    name: Option<String>,
}

#[derive(Clone, PartialEq, Message)]
struct ThreadTrack {
    #[prost(int32, optional, tag = "1")]
    pid: Option<i32>,
    #[prost(int64, optional, tag = "2")]
    tid: Option<i64>,
    #[prost(string, optional, tag = "5")]
    name: Option<String>,
}

/// See the module's text.
pub(crate) struct Perfetto {
    output: Stream,
    buffer: Vec<u8>,
    /// Of the current thread.
    sequence: u32,
    /// Functions that the current sequence has the names of.
    named: HashSet<u32>,
    /// Modules likewise, by their numbers.
    categories: HashMap<String, u64>,
    /// Processes that have a track.
    processes: HashSet<u32>,
}

impl Perfetto {
    pub(crate) fn new(output: Stream) -> Self {
        Self {
            output,
            buffer: Vec::new(),
            sequence: 0,
            named: HashSet::new(),
            categories: HashMap::new(),
            processes: HashSet::new(),
        }
    }

    fn packet(&mut self, packet: &Packet) -> io::Result<()> {
        self.buffer.clear();
        self.buffer.push(PACKET_KEY);
        packet.encode_length_delimited(&mut self.buffer)?;
        self.output.write_all(&self.buffer)
    }

    fn event(&mut self, kind: i32, timestamp: u64, called: Option<(&Trace, u32)>) -> io::Result<()> {
        let interned = called.and_then(|(trace, function)| self.intern(trace, function));
        let event = Event {
            categories: called
                .iter()
                .map(|(trace, function)| self.categories[&trace.function(*function).path])
                .collect(),
            kind: Some(kind),
            name: called.map(|(_, function)| u64::from(function) + 1),
        };
        self.packet(&Packet {
            timestamp: Some(timestamp),
            sequence: Some(self.sequence),
            event: Some(event),
            interned,
            sequence_flags: Some(STATE_NEEDED),
            ..Packet::default()
        })
    }

    /// What the sequence has to be told before it names this function.
    fn intern(&mut self, trace: &Trace, function: u32) -> Option<Interned> {
        if !self.named.insert(function) {
            return None;
        }
        let known = trace.function(function);
        let name = |id: u64, name: &str| Name { id: Some(id), name: Some(name.to_owned()) };
        let mut categories = Vec::new();
        if !self.categories.contains_key(&known.path) {
            let id = self.categories.len() as u64 + 1;
            self.categories.insert(known.path.clone(), id);
            categories.push(name(id, known.module()));
        }
        Some(Interned { categories, names: vec![name(u64::from(function) + 1, &known.name)] })
    }
}

impl Output for Perfetto {
    fn thread(&mut self, _: &Trace, thread: &Thread) -> io::Result<()> {
        let of_process = 1 << 32 | u64::from(thread.process.id);
        let of_thread = 2 << 32 | u64::from(thread.stream);
        self.sequence += 1;
        self.named.clear();
        self.categories.clear();
        let pid = Some(thread.pid.cast_signed());
        let mut is_first = Some(true);
        if self.processes.insert(thread.process.id) {
            let process =
                ProcessTrack { pid, command: thread.process.command.clone(), name: Some(thread.program().to_owned()) };
            let track = Track { uuid: Some(of_process), process: Some(process), ..Track::default() };
            let sequence = Some(self.sequence);
            self.packet(&Packet { sequence, track: Some(track), is_first: is_first.take(), ..Packet::default() })?;
        }
        let of = ThreadTrack { pid, tid: Some(thread.tid.into()), name: Some(thread.name.clone()) };
        let track = Track { uuid: Some(of_thread), thread: Some(of), parent: Some(of_process), ..Track::default() };
        self.packet(&Packet {
            sequence: Some(self.sequence),
            sequence_flags: Some(STATE_BEGINS),
            defaults: Some(Defaults { event: Some(EventDefaults { track: Some(of_thread) }) }),
            track: Some(track),
            is_first,
            ..Packet::default()
        })
    }

    fn enter(&mut self, trace: &Trace, _: &Thread, enter: Enter) -> io::Result<()> {
        self.event(SLICE_BEGIN, enter.start_ns, Some((trace, enter.function)))
    }

    fn leave(&mut self, _: &Trace, _: &Thread, call: Call) -> io::Result<()> {
        self.event(SLICE_END, call.end_ns, None)
    }

    fn point(&mut self, trace: &Trace, _: &Thread, enter: Enter) -> io::Result<()> {
        self.event(INSTANT, enter.start_ns, Some((trace, enter.function)))
    }

    fn end(mut self, _: &Trace) -> io::Result<()> {
        self.output.flush()
    }
}
