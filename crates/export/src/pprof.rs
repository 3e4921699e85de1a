//! pprof's protobuf: calls and time of each distinct stack.
//!
//! Owns the messages, as far as they are needed, and [`Pprof`]. Field numbers are those of pprof's `profile.proto`. A stack's values are how often it was called and how long its
//! innermost function ran itself, so that pprof's flat and cumulative times are the report's. Invariant: the string table begins with the empty string, and
//! identifiers of mappings, locations and functions begin with 1.

use std::{
    collections::HashMap,
    io::{self, Write},
};

use prost::Message;
use trapline_trace::{Node, Stacks};

use crate::{
    source::{Call, Enter, Output, Thread, Trace},
    target::Stream,
};

#[derive(Clone, PartialEq, Message)]
struct Profile {
    #[prost(message, repeated, tag = "1")]
    sample_types: Vec<ValueType>,
    #[prost(message, repeated, tag = "2")]
    samples: Vec<Sample>,
    #[prost(message, repeated, tag = "3")]
    mappings: Vec<Mapping>,
    #[prost(message, repeated, tag = "4")]
    locations: Vec<Location>,
    #[prost(message, repeated, tag = "5")]
    functions: Vec<Function>,
    #[prost(string, repeated, tag = "6")]
    strings: Vec<String>,
    #[prost(int64, tag = "9")]
    time_nanos: i64,
    #[prost(int64, tag = "10")]
    duration_nanos: i64,
    #[prost(message, optional, tag = "11")]
    period_type: Option<ValueType>,
    #[prost(int64, tag = "12")]
    period: i64,
    #[prost(int64, tag = "14")]
    default_sample_type: i64,
}

#[derive(Clone, Copy, PartialEq, Message)]
struct ValueType {
    #[prost(int64, tag = "1")]
    kind: i64,
    #[prost(int64, tag = "2")]
    unit: i64,
}

#[derive(Clone, PartialEq, Message)]
struct Sample {
    #[prost(uint64, repeated, tag = "1")]
    locations: Vec<u64>,
    #[prost(int64, repeated, tag = "2")]
    values: Vec<i64>,
}

#[derive(Clone, PartialEq, Message)]
struct Mapping {
    #[prost(uint64, tag = "1")]
    id: u64,
    #[prost(int64, tag = "5")]
    file: i64,
    #[prost(int64, tag = "6")]
    build_id: i64,
    #[prost(bool, tag = "7")]
    has_functions: bool,
}

#[derive(Clone, PartialEq, Message)]
struct Location {
    #[prost(uint64, tag = "1")]
    id: u64,
    #[prost(uint64, tag = "2")]
    mapping: u64,
    #[prost(uint64, tag = "3")]
    address: u64,
    #[prost(message, repeated, tag = "4")]
    lines: Vec<Line>,
}

#[derive(Clone, Copy, PartialEq, Message)]
struct Line {
    #[prost(uint64, tag = "1")]
    function: u64,
}

#[derive(Clone, PartialEq, Message)]
struct Function {
    #[prost(uint64, tag = "1")]
    id: u64,
    #[prost(int64, tag = "2")]
    name: i64,
    #[prost(int64, tag = "3")]
    system_name: i64,
    #[prost(int64, tag = "4")]
    file: i64,
}

/// See the module's text.
pub(crate) struct Pprof {
    output: Stream,
    tree: Stacks,
    first_ns: u64,
    last_ns: u64,
}

impl Pprof {
    pub(crate) fn new(output: Stream) -> Self {
        Self { output, tree: Stacks::default(), first_ns: u64::MAX, last_ns: 0 }
    }
}

/// The table of strings, and where in it each is.
struct Strings {
    list: Vec<String>,
    index: HashMap<String, i64>,
}

impl Strings {
    fn new() -> Self {
        Self { list: vec![String::new()], index: HashMap::from([(String::new(), 0)]) }
    }

    fn at(&mut self, text: &str) -> i64 {
        if let Some(index) = self.index.get(text) {
            return *index;
        }
        let index = i64::try_from(self.list.len()).unwrap_or(i64::MAX);
        self.list.push(text.to_owned());
        self.index.insert(text.to_owned(), index);
        index
    }
}

impl Output for Pprof {
    fn enter(&mut self, _: &Trace, _: &Thread, enter: Enter) -> io::Result<()> {
        self.first_ns = self.first_ns.min(enter.start_ns);
        self.tree.enter(enter.function);
        Ok(())
    }

    fn leave(&mut self, _: &Trace, _: &Thread, call: Call) -> io::Result<()> {
        self.last_ns = self.last_ns.max(call.end_ns);
        self.tree.leave(call.self_ns);
        Ok(())
    }

    fn point(&mut self, _: &Trace, _: &Thread, enter: Enter) -> io::Result<()> {
        self.tree.point(enter.function);
        Ok(())
    }

    fn end(mut self, trace: &Trace) -> io::Result<()> {
        let mut strings = Strings::new();
        let calls = ValueType { kind: strings.at("calls"), unit: strings.at("count") };
        let time = ValueType { kind: strings.at("time"), unit: strings.at("nanoseconds") };
        let (mut mappings, mut mapping_of) = (Vec::new(), HashMap::new());
        for module in trace.catalog.modules.values() {
            let id = mappings.len() as u64 + 1;
            mapping_of.insert(module.path.as_str(), id);
            let build_id = strings.at(module.build_id.as_deref().unwrap_or_default());
            mappings.push(Mapping { id, file: strings.at(&module.path), build_id, has_functions: true });
        }
        let (mut locations, mut functions) = (Vec::new(), Vec::new());
        for (id, known) in (1..).zip(&trace.functions) {
            let mapping = mapping_of.get(known.path.as_str()).copied().unwrap_or_default();
            locations.push(Location { id, mapping, address: known.address, lines: vec![Line { function: id }] });
            let name = strings.at(&known.name);
            functions.push(Function { id, name, system_name: name, file: strings.at(&known.path) });
        }
        let value = |count: u64| i64::try_from(count).unwrap_or(i64::MAX);
        let sample = |node: &Node| Sample {
            locations: self.tree.callers(node).map(|node| u64::from(node.function) + 1).collect(),
            values: vec![value(node.calls), value(node.own)],
        };
        let profile = Profile {
            sample_types: vec![calls, time],
            samples: self.tree.nodes().iter().map(sample).collect(),
            mappings,
            locations,
            functions,
            time_nanos: value(trace.catalog.meta.as_ref().map_or(0, |meta| meta.started_unix_ns)),
            duration_nanos: value(self.last_ns.saturating_sub(self.first_ns)),
            period_type: Some(time),
            period: 1,
            default_sample_type: time.kind,
            strings: strings.list,
        };
        self.output.write_all(&profile.encode_to_vec())?;
        self.output.flush()
    }
}
