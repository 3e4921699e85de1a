//! Rows of the table `calls`.
//!
//! Owns the columns' order and what is in them. The calls come from [`trapline_export::Calls`], one thread after the other.

use std::{collections::BTreeMap, sync::Arc};

use trapline_export::{Calls, Row};

use crate::{
    Error, Value,
    whole::{Source, number},
};

/// As `SQLite` wants it declared.
pub(crate) const DECLARED: &std::ffi::CStr = c"CREATE TABLE calls(stream INTEGER, pid INTEGER, tid INTEGER, thread TEXT, program TEXT, site INTEGER, function TEXT, module TEXT, address INTEGER, depth INTEGER, start_ns INTEGER, duration_ns INTEGER, self_ns INTEGER, ending TEXT, host TEXT, trace_unix_ns INTEGER)";

/// Columns by which rows are left out before they are made: the stream, the process, the thread. Other threads are not even read then.
pub(crate) const KEYS: [usize; 3] = [0, 1, 2];

/// The calls that one cursor goes through.
pub(crate) struct Rows {
    source: Arc<Source>,
    calls: Calls,
    current: Option<Row>,
}

impl Rows {
    /// Those of the threads that have these values in the columns of [`KEYS`].
    pub(crate) fn open(source: &Arc<Source>, wanted: &BTreeMap<usize, i64>) -> Result<Self, Error> {
        let calls = Calls::open(&source.input, |thread| {
            let values = [thread.stream, thread.pid, thread.tid].map(i64::from);
            wanted.iter().all(|(column, value)| values.get(*column) == Some(value))
        })?;
        let mut rows = Self { source: Arc::clone(source), calls, current: None };
        rows.advance()?;
        Ok(rows)
    }

    pub(crate) fn advance(&mut self) -> Result<(), Error> {
        self.current = self.calls.next_call()?;
        if self.current.is_none() {
            self.source.note_senseless(self.calls.senseless_chunks());
        }
        Ok(())
    }

    pub(crate) fn is_at_end(&self) -> bool {
        self.current.is_none()
    }

    pub(crate) fn value(&self, column: usize) -> Value<'_> {
        let (Some(call), Some(thread)) = (&self.current, self.calls.thread()) else { return Value::Null };
        let function = self.calls.function(call.function);
        let timed = |ns: Option<u64>| ns.map_or(Value::Null, |ns| Value::Integer(number(ns)));
        match column {
            0 => Value::Integer(thread.stream.into()),
            1 => Value::Integer(thread.pid.into()),
            2 => Value::Integer(thread.tid.into()),
            3 => Value::Text(&thread.name),
            4 => Value::Text(thread.program()),
            5 => Value::Integer(function.site.into()),
            6 => Value::Text(&function.name),
            7 => Value::Text(&function.path),
            8 => Value::Integer(number(function.address)),
            9 => Value::Integer(number(call.depth as u64)),
            10 => Value::Integer(number(call.start_ns)),
            11 => timed(call.duration_ns),
            12 => timed(call.self_ns),
            13 => Value::Text(call.ending),
            14 => Value::Text(self.source.catalog.meta.as_ref().map_or("", |meta| meta.host.as_str())),
            15 => Value::Integer(self.source.catalog.meta.as_ref().map_or(0, |meta| number(meta.started_unix_ns))),
            _ => Value::Null,
        }
    }
}
