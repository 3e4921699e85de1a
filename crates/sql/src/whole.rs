//! Rows of the tables `functions`, `threads` and `losses`: what is known of the whole trace.
//!
//! Owns the [`Source`], the columns' order and what is in them. Rows are made when they are first asked for, and kept: there are as many as the program has functions and threads. The numbers of
//! `functions` are those of [`trapline_trace::profile()`], which `trapline report` shows.

use std::{
    collections::{BTreeMap, BTreeSet},
    path::PathBuf,
    sync::{
        Arc, OnceLock,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
};

use trapline_trace::{Catalog, Damage, FunctionProfile, profile};

use crate::{Error, Value};

pub(crate) const FUNCTIONS: &std::ffi::CStr = c"CREATE TABLE functions(site INTEGER, function TEXT, module TEXT, address INTEGER, size INTEGER, traced INTEGER, reason TEXT, calls INTEGER, open INTEGER, total_ns INTEGER, self_ns INTEGER, sum_ns INTEGER, min_ns INTEGER, avg_ns INTEGER, max_ns INTEGER, p50_ns INTEGER, p99_ns INTEGER)";
pub(crate) const THREADS: &std::ffi::CStr = c"CREATE TABLE threads(stream INTEGER, pid INTEGER, tid INTEGER, thread TEXT, program TEXT, command TEXT, started_ns INTEGER, status INTEGER)";
pub(crate) const LOSSES: &std::ffi::CStr = c"CREATE TABLE losses(cause TEXT, count INTEGER)";

/// Columns by which rows are looked up: what other tables refer to.
pub(crate) const KEYS: [usize; 1] = [0];

/// A trace.
#[derive(Debug)]
pub(crate) struct Source {
    pub(crate) input: PathBuf,
    pub(crate) catalog: Catalog,
    pub(crate) damage: Damage,
    functions: OnceLock<Rows>,
    threads: OnceLock<Rows>,
    losses: OnceLock<Rows>,
    senseless_chunks: AtomicU64,
    /// Answers are not wanted.
    pub(crate) is_cancelled: Arc<AtomicBool>,
}

/// A value that is kept.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) enum Cell {
    Null,
    Integer(i64),
    Text(String),
}

impl Cell {
    pub(crate) fn value(&self) -> Value<'_> {
        match self {
            Self::Null => Value::Null,
            Self::Integer(number) => Value::Integer(*number),
            Self::Text(text) => Value::Text(text),
        }
    }
}

impl From<u64> for Cell {
    fn from(count: u64) -> Self {
        Self::Integer(number(count))
    }
}

impl From<u32> for Cell {
    fn from(number: u32) -> Self {
        Self::Integer(number.into())
    }
}

impl From<&str> for Cell {
    fn from(text: &str) -> Self {
        Self::Text(text.to_owned())
    }
}

impl<T: Into<Cell>> From<Option<T>> for Cell {
    fn from(value: Option<T>) -> Self {
        value.map_or(Self::Null, Into::into)
    }
}

/// A table's rows, in the order of their first column where that is a number.
pub(crate) type Rows = Vec<Vec<Cell>>;

/// `SQLite`'s numbers have a sign.
pub(crate) fn number(count: u64) -> i64 {
    i64::try_from(count).unwrap_or(i64::MAX)
}

impl Source {
    pub(crate) fn new(input: PathBuf, catalog: Catalog, damage: Damage) -> Self {
        let (functions, threads, losses) = (OnceLock::new(), OnceLock::new(), OnceLock::new());
        let (senseless_chunks, is_cancelled) = (AtomicU64::new(0), Arc::default());
        Self { input, catalog, damage, functions, threads, losses, senseless_chunks, is_cancelled }
    }

    /// For who makes rows and is not asked for any meanwhile.
    pub(crate) fn go_on(&self) -> Result<(), Error> {
        // Relaxed: nothing else is told by it.
        if self.is_cancelled.load(Ordering::Relaxed) { Err(Error::Cancelled) } else { Ok(()) }
    }

    /// Notes what one pass through the events found. Each pass finds the same.
    pub(crate) fn note_senseless(&self, chunks: u64) {
        // Relaxed: a number, read when all is done.
        self.senseless_chunks.fetch_max(chunks, Ordering::Relaxed);
    }

    pub(crate) fn senseless_chunks(&self) -> u64 {
        self.senseless_chunks.load(Ordering::Relaxed)
    }

    pub(crate) fn functions(&self) -> Result<&Rows, Error> {
        if self.functions.get().is_none() {
            let profile = profile(&self.input)?;
            self.note_senseless(profile.damage.senseless_chunks);
            let _ = self.functions.set(self.rows_of_functions(&profile.functions));
        }
        Ok(self.functions.get_or_init(Vec::new))
    }

    pub(crate) fn threads(&self) -> &Rows {
        self.threads.get_or_init(|| self.rows_of_threads())
    }

    pub(crate) fn losses(&self) -> &Rows {
        self.losses.get_or_init(|| self.rows_of_losses())
    }

    fn rows_of_functions(&self, called: &[FunctionProfile]) -> Rows {
        let called: BTreeMap<u32, &FunctionProfile> = called.iter().map(|function| (function.site, function)).collect();
        let sites: BTreeSet<u32> =
            self.catalog.functions().map(|function| function.site).chain(called.keys().copied()).collect();
        let clock = self.catalog.clock();
        let rows = sites.into_iter().map(|site| {
            let found = self.catalog.function(site);
            let function = found.function;
            let profile = called.get(&site).copied();
            let ns = |ticks: Option<u64>| ticks.map(|ticks| clock.ns(ticks));
            let timed = profile.filter(|profile| profile.timed > 0);
            vec![
                site.into(),
                found.name().as_str().into(),
                found.module_path().into(),
                function.map_or(0, |function| function.address).into(),
                function.map(|function| function.size).into(),
                u32::from(function.is_none_or(|function| function.untraced.is_none())).into(),
                function.and_then(|function| function.untraced.as_deref()).into(),
                profile.map_or(0, |profile| profile.calls).into(),
                profile.map_or(0, |profile| profile.open).into(),
                ns(profile.map(|profile| profile.total_ticks)).unwrap_or(0).into(),
                ns(profile.map(|profile| profile.self_ticks)).unwrap_or(0).into(),
                ns(profile.map(|profile| profile.sum_ticks)).unwrap_or(0).into(),
                ns(timed.map(|profile| profile.min_ticks)).into(),
                ns(timed.and_then(FunctionProfile::average_ticks)).into(),
                ns(timed.map(|profile| profile.max_ticks)).into(),
                ns(timed.and_then(|profile| profile.percentile_ticks(500))).into(),
                ns(timed.and_then(|profile| profile.percentile_ticks(990))).into(),
            ]
        });
        rows.collect()
    }

    fn rows_of_threads(&self) -> Rows {
        let clock = self.catalog.clock();
        let rows = self.catalog.streams.values().map(|stream| {
            let process = self.catalog.processes.get(&stream.process);
            let exit = self.catalog.exits.get(&stream.process);
            let thread = trapline_export::Thread::new(&self.catalog, stream.id);
            vec![
                stream.id.into(),
                thread.pid.into(),
                stream.tid.into(),
                thread.name.as_str().into(),
                thread.program().into(),
                process.map(|process| process.command.join(" ")).as_deref().into(),
                clock.since_start_ns(stream.started_tsc).into(),
                exit.and_then(|exit| exit.status).map_or(Cell::Null, |status| Cell::Integer(status.into())),
            ]
        });
        rows.collect()
    }

    fn rows_of_losses(&self) -> Rows {
        let (losses, damage) = (&self.catalog.losses, &self.damage);
        let named = [
            ("full", losses.full),
            ("overwritten", losses.overwritten),
            ("torn", losses.torn),
            ("unwritten", losses.unwritten),
            ("unhooked", losses.unhooked),
            ("waited_ns", losses.waited_ns),
            ("damaged_bytes", damage.skipped_bytes),
            ("damaged_records", damage.missing_records),
            ("finished", u64::from(damage.is_finished)),
        ];
        let others = losses.other.iter().map(|(cause, count)| (cause.as_str(), *count));
        named.into_iter().chain(others).map(|(cause, count)| vec![cause.into(), count.into()]).collect()
    }
}
