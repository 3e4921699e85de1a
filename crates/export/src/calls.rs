//! Calls, one after the other, for who asks for the next one.
//!
//! Owns [`Calls`], the other way round of an `Output`: it gathers the calls of some events of a thread, and gives them away before it goes on. Invariant: memory holds the calls that have ended
//! within one chunk of events, and the threads' open ones.

use std::{collections::VecDeque, io, path::Path};

use trapline_trace::{Ending, Error};

use crate::{
    error::Failure,
    source::{self, Drive, ENDINGS, Enter, Function, Output, Thread, Trace, place_of},
};

/// The calls of a trace, in the order in which they ended, one thread after the other.
#[derive(Debug)]
pub struct Calls {
    drive: Drive<Gathered>,
}

/// A call that has ended. Times are nanoseconds, the start's from the start of the trace.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Row {
    /// For [`Calls::function`].
    pub function: u32,
    /// How many calls that are known were open.
    pub depth: usize,
    /// When it began.
    pub start_ns: u64,
    /// With what it called; `None` if nobody knows when it ended.
    pub duration_ns: Option<u64>,
    /// Without what it called.
    pub self_ns: Option<u64>,
    /// How it ended, as Parquet files have it.
    pub ending: &'static str,
}

/// What was told and not given yet.
#[derive(Debug, Default)]
struct Gathered {
    thread: Option<Thread>,
    rows: VecDeque<Row>,
}

impl Calls {
    /// Opens a trace, and finds the events of the threads that are wanted.
    ///
    /// # Errors
    /// Those of [`Reader::open`](trapline_trace::Reader::open) and [`Reader::next_chunk`](trapline_trace::Reader::next_chunk).
    pub fn open(input: &Path, is_wanted: impl Fn(&Thread) -> bool) -> Result<Self, Error> {
        let wanted = |catalog: &_, stream| is_wanted(&Thread::new(catalog, stream));
        Drive::open(input, Gathered::default(), wanted).map(|drive| Self { drive }).map_err(trace_error)
    }

    /// The next call, or `None` at the end.
    ///
    /// # Errors
    /// [`Error::Read`].
    pub fn next_call(&mut self) -> Result<Option<Row>, Error> {
        while self.drive.output.rows.is_empty() {
            if !self.drive.step().map_err(trace_error)? {
                return Ok(None);
            }
        }
        Ok(self.drive.output.rows.pop_front())
    }

    /// The thread of the latest call; before the first one, none that was recorded.
    pub fn thread(&self) -> Option<&Thread> {
        self.drive.output.thread.as_ref()
    }

    /// The function of a call.
    pub fn function(&self, number: u32) -> &Function {
        self.drive.trace.function(number)
    }

    /// Chunks so far whose checksums are right, and whose events make no sense.
    pub fn senseless_chunks(&self) -> u64 {
        self.drive.senseless_chunks()
    }
}

/// What is gathered is not written anywhere, so that cannot fail.
fn trace_error(failure: Failure) -> Error {
    match failure {
        Failure::Trace(error) => error,
        Failure::Output(source) => Error::Read { path: std::path::PathBuf::new(), source },
    }
}

impl Gathered {
    fn gather(&mut self, enter: Enter, timed: Option<(u64, u64)>, ending: Option<Ending>) {
        let Enter { function, depth, start_ns } = enter;
        let (duration_ns, self_ns) = timed.unzip();
        let ending = ENDINGS[place_of(ending)];
        self.rows.push_back(Row { function, depth, start_ns, duration_ns, self_ns, ending });
    }
}

impl Output for Gathered {
    fn thread(&mut self, _: &Trace, thread: &Thread) -> io::Result<()> {
        self.thread = Some(thread.clone());
        Ok(())
    }

    fn leave(&mut self, _: &Trace, _: &Thread, call: source::Call) -> io::Result<()> {
        let source::Call { function, depth, start_ns, end_ns, self_ns, ending } = call;
        let timed = (ending != Ending::Unknown).then(|| (end_ns - start_ns, self_ns));
        self.gather(Enter { function, depth, start_ns }, timed, Some(ending));
        Ok(())
    }

    fn point(&mut self, _: &Trace, _: &Thread, enter: Enter) -> io::Result<()> {
        self.gather(enter, None, None);
        Ok(())
    }

    fn end(self, _: &Trace) -> io::Result<()> {
        Ok(())
    }
}
