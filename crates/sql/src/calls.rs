//! Rows of the table `calls`, as they come.
//!
//! Owns the columns' order and what is in them, and [`Rows`]. The calls come from [`trapline_export::Calls`], one thread after the other. Where they have to come otherwise, [`clusters`](crate::clusters)
//! takes them from here. Invariant: a row has the same number, whatever rows are left out.

use std::{collections::BTreeMap, sync::Arc};

use trapline_export::{Calls, Function, Row, Thread, ending_word};

use crate::{
    Error, Value,
    whole::{Cell, Source, number},
};

/// As `SQLite` wants it declared.
pub(crate) const DECLARED: &std::ffi::CStr = c"CREATE TABLE calls(stream INTEGER, pid INTEGER, tid INTEGER, thread TEXT, program TEXT, site INTEGER, function TEXT, module TEXT, address INTEGER, depth INTEGER, start_ns INTEGER, duration_ns INTEGER, self_ns INTEGER, ending TEXT, host TEXT, trace_unix_ns INTEGER)";

/// Columns.
pub(crate) mod column {
    pub(crate) const STREAM: usize = 0;
    pub(crate) const PROGRAM: usize = 4;
    pub(crate) const SITE: usize = 5;
    pub(crate) const FUNCTION: usize = 6;
    pub(crate) const ADDRESS: usize = 8;
    pub(crate) const DEPTH: usize = 9;
    pub(crate) const START: usize = 10;
    pub(crate) const DURATION: usize = 11;
    pub(crate) const SELF: usize = 12;
    pub(crate) const ENDING: usize = 13;
    pub(crate) const ALL: usize = 16;
}

/// Columns by whose values rows are left out before they are made: the stream, the process, the thread, the site, the function. Other threads are not even read then.
pub(crate) const KEYS: [usize; 5] = [0, 1, 2, column::SITE, column::FUNCTION];

/// Rows of a thread have numbers from this times its stream on.
const ROWS_A_STREAM: i64 = 1 << 40;

/// Rows after which whoever makes them looks whether an answer is still wanted.
pub(crate) const ROWS_A_LOOK: i64 = 1 << 16;

/// What rows must have in columns of [`KEYS`]: one of these values.
pub(crate) type Wanted = BTreeMap<usize, Vec<Cell>>;

fn is_met(wishes: &[Cell], value: Value<'_>) -> bool {
    wishes.iter().any(|wish| wish.value() == value)
}

/// The calls that one cursor goes through.
pub(crate) struct Rows {
    source: Arc<Source>,
    calls: Calls,
    /// Of functions.
    wanted: Wanted,
    /// Which functions they are, as far as they were met.
    is_wanted: Vec<bool>,
    current: Option<Row>,
    stream: Option<u32>,
    rowid: i64,
}

impl Rows {
    pub(crate) fn open(source: &Arc<Source>, wanted: &Wanted) -> Result<Self, Error> {
        let of_threads = |column: &usize| *column < column::SITE;
        let calls = Calls::open(&source.input, |thread| {
            let mut wishes = wanted.iter().filter(|(column, _)| of_threads(column));
            wishes.all(|(column, wishes)| is_met(wishes, of_thread(*column, thread)))
        })?;
        let wanted = wanted.iter().filter(|(column, _)| !of_threads(column));
        let wanted = wanted.map(|(column, wishes)| (*column, wishes.clone())).collect();
        let (source, is_wanted) = (Arc::clone(source), Vec::new());
        Ok(Self { source, calls, wanted, is_wanted, current: None, stream: None, rowid: 0 })
    }

    /// Goes to the next row. False if there is none.
    pub(crate) fn advance(&mut self) -> Result<bool, Error> {
        loop {
            self.current = self.calls.next_call()?;
            let Some(row) = self.current else {
                self.source.note_senseless(self.calls.senseless_chunks());
                return Ok(false);
            };
            let stream = self.calls.thread().map(|thread| thread.stream);
            self.rowid += 1;
            if stream != self.stream {
                (self.stream, self.rowid) = (stream, i64::from(stream.unwrap_or(0)).saturating_mul(ROWS_A_STREAM));
            }
            if self.wanted.is_empty() || self.is_wanted(row.function) {
                return Ok(true);
            }
            if self.rowid % ROWS_A_LOOK == 0 {
                self.source.go_on()?;
            }
        }
    }

    /// The row that it is at, and whose it is.
    pub(crate) fn current(&self) -> Option<(&Row, &Arc<Thread>)> {
        self.current.as_ref().zip(self.calls.thread())
    }

    pub(crate) fn rowid(&self) -> i64 {
        self.rowid
    }

    /// Functions of all rows so far, by the rows' numbers for them.
    pub(crate) fn functions(&self) -> &[Function] {
        self.calls.functions()
    }

    pub(crate) fn value(&self, column: usize) -> Value<'_> {
        let Some((call, thread)) = self.current() else { return Value::Null };
        match column {
            ..column::SITE => of_thread(column, thread),
            column::SITE..=column::ADDRESS => of_function(column, self.calls.function(call.function)),
            _ => of_call(column, call, &self.source),
        }
    }

    fn is_wanted(&mut self, function: u32) -> bool {
        for met in &self.calls.functions()[self.is_wanted.len()..] {
            self.is_wanted.push(self.wanted.iter().all(|(column, wishes)| is_met(wishes, of_function(*column, met))));
        }
        self.is_wanted[function as usize]
    }
}

/// What is the same for all calls of a thread.
pub(crate) fn of_thread(column: usize, thread: &Thread) -> Value<'_> {
    match column {
        0 => Value::Integer(thread.stream.into()),
        1 => Value::Integer(thread.pid.into()),
        2 => Value::Integer(thread.tid.into()),
        3 => Value::Text(&thread.name),
        4 => Value::Text(thread.program()),
        _ => Value::Null,
    }
}

/// What is the same for all calls of a function.
pub(crate) fn of_function(column: usize, function: &Function) -> Value<'_> {
    match column {
        5 => Value::Integer(function.site.into()),
        6 => Value::Text(&function.name),
        7 => Value::Text(&function.path),
        8 => Value::Integer(number(function.address)),
        _ => Value::Null,
    }
}

/// The rest.
pub(crate) fn of_call<'a>(column: usize, call: &Row, source: &'a Source) -> Value<'a> {
    let timed = |ns: u64| if call.is_timed() { Value::Integer(number(ns)) } else { Value::Null };
    match column {
        column::DEPTH => Value::Integer(call.depth.into()),
        column::START => Value::Integer(number(call.start_ns)),
        column::DURATION => timed(call.duration_ns),
        column::SELF => timed(call.self_ns),
        column::ENDING => Value::Text(ending_word(call.ending)),
        14 => Value::Text(source.catalog.meta.as_ref().map_or("", |meta| meta.host.as_str())),
        15 => Value::Integer(source.catalog.meta.as_ref().map_or(0, |meta| number(meta.started_unix_ns))),
        _ => Value::Null,
    }
}
