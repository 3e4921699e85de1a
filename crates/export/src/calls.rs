//! Calls, one after the other, for who asks for the next one.
//!
//! Owns [`Calls`], the other way round of an `Output`. A thread of its own goes through the trace, gathers the calls of some events of a thread, and goes on while these are given away. Invariant:
//! memory holds the calls that have ended within a few chunks of events, and the threads' open ones.

use std::{
    io,
    panic::resume_unwind,
    path::Path,
    sync::{
        Arc,
        mpsc::{Receiver, Sender, SyncSender, channel, sync_channel},
    },
    thread::JoinHandle,
};

use trapline_trace::{Ending, Error};

use crate::{
    error::Failure,
    source::{self, Drive, ENDINGS, Enter, Function, Output, Thread, Trace, place_of},
};

/// How far the one who gathers is ahead.
const BATCHES: usize = 3;

/// The calls of a trace, in the order in which they ended, one thread after the other.
#[derive(Debug)]
pub struct Calls {
    /// None when it is dropped.
    batches: Option<Receiver<Result<Batch, Error>>>,
    /// Gives memory back.
    spare: Sender<Vec<Row>>,
    worker: Option<JoinHandle<()>>,
    functions: Vec<Function>,
    batch: Batch,
    /// How many of its rows were given.
    given: usize,
}

/// A call that has ended. Times are nanoseconds, the start's from the start of the trace.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Row {
    /// For [`Calls::function`].
    pub function: u32,
    /// How many calls that are known were open.
    pub depth: u32,
    /// When it began.
    pub start_ns: u64,
    /// With what it called; 0 where [`Row::is_timed`] is false.
    pub duration_ns: u64,
    /// Without what it called.
    pub self_ns: u64,
    /// How it ended; `None` if its return is not recorded.
    pub ending: Option<Ending>,
}

impl Row {
    /// It is known when it ended.
    pub fn is_timed(&self) -> bool {
        self.ending.is_some_and(|ending| ending != Ending::Unknown)
    }
}

/// How a call ended, as Parquet files have it.
pub fn ending_word(ending: Option<Ending>) -> &'static str {
    ENDINGS[place_of(ending)]
}

/// Some calls of one thread.
#[derive(Debug, Default)]
struct Batch {
    thread: Option<Arc<Thread>>,
    /// Those that were met for the first time.
    functions: Vec<Function>,
    rows: Vec<Row>,
    senseless_chunks: u64,
    is_last: bool,
}

/// What was told and not given yet.
#[derive(Debug, Default)]
struct Gathered {
    thread: Option<Arc<Thread>>,
    rows: Vec<Row>,
}

impl Calls {
    /// Opens a trace, and finds the events of the threads that are wanted.
    ///
    /// # Errors
    /// Those of [`Reader::open`](trapline_trace::Reader::open) and [`Reader::next_chunk`](trapline_trace::Reader::next_chunk).
    pub fn open(input: &Path, is_wanted: impl Fn(&Thread) -> bool) -> Result<Self, Error> {
        let wanted = |catalog: &_, stream| is_wanted(&Thread::new(catalog, stream));
        let drive = Drive::open(input, Gathered::default(), wanted).map_err(trace_error)?;
        let (full, batches) = sync_channel(BATCHES);
        let (spare, empty) = channel();
        let worker = std::thread::Builder::new().name("calls".to_owned()).spawn(move || gather(drive, &full, &empty));
        let worker = worker.map_err(|source| Error::Read { path: input.into(), source })?;
        let (functions, batch) = (Vec::new(), Batch::default());
        Ok(Self { batches: Some(batches), spare, worker: Some(worker), functions, batch, given: 0 })
    }

    /// The next call, or `None` at the end.
    ///
    /// # Errors
    /// [`Error::Read`].
    #[inline]
    pub fn next_call(&mut self) -> Result<Option<Row>, Error> {
        loop {
            if let Some(row) = self.batch.rows.get(self.given) {
                self.given += 1;
                return Ok(Some(*row));
            }
            if !self.next_batch()? {
                return Ok(None);
            }
        }
    }

    /// The thread of the latest call; before the first one, none that was recorded.
    pub fn thread(&self) -> Option<&Arc<Thread>> {
        self.batch.thread.as_ref()
    }

    /// The function of a call.
    pub fn function(&self, number: u32) -> &Function {
        &self.functions[number as usize]
    }

    /// The functions of all calls so far, by their numbers.
    pub fn functions(&self) -> &[Function] {
        &self.functions
    }

    /// Chunks so far whose checksums are right, and whose events make no sense.
    pub fn senseless_chunks(&self) -> u64 {
        self.batch.senseless_chunks
    }

    /// Takes calls that were gathered. False if there are no more.
    fn next_batch(&mut self) -> Result<bool, Error> {
        if self.batch.is_last {
            return Ok(false);
        }
        let next = self.batches.as_ref().and_then(|batches| batches.recv().ok());
        let Some(next) = next else {
            // It has not come to the end, and tells nothing more.
            if let Some(Err(panic)) = self.worker.take().map(JoinHandle::join) {
                resume_unwind(panic);
            }
            return Ok(false);
        };
        let mut old = std::mem::replace(&mut self.batch, next?);
        old.rows.clear();
        let _ = self.spare.send(old.rows);
        self.functions.append(&mut self.batch.functions);
        self.given = 0;
        Ok(true)
    }
}

impl Drop for Calls {
    fn drop(&mut self) {
        // Whoever gathers notices that nobody takes it.
        self.batches = None;
        if let Some(worker) = self.worker.take() {
            let _ = worker.join();
        }
    }
}

/// Gathers all calls, until nobody takes them.
fn gather(mut drive: Drive<Gathered>, full: &SyncSender<Result<Batch, Error>>, empty: &Receiver<Vec<Row>>) {
    let mut known = 0;
    loop {
        let is_last = match drive.step() {
            Ok(goes_on) => !goes_on,
            Err(failure) => {
                let _ = full.send(Err(trace_error(failure)));
                return;
            }
        };
        if drive.output.rows.is_empty() && !is_last {
            continue;
        }
        let rows = std::mem::replace(&mut drive.output.rows, empty.try_recv().unwrap_or_default());
        let functions = drive.trace.functions[known..].to_vec();
        known += functions.len();
        let (thread, senseless_chunks) = (drive.output.thread.clone(), drive.senseless_chunks());
        if full.send(Ok(Batch { thread, functions, rows, senseless_chunks, is_last })).is_err() || is_last {
            return;
        }
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
    fn gather(&mut self, enter: Enter, duration_ns: u64, self_ns: u64, ending: Option<Ending>) {
        let Enter { function, depth, start_ns } = enter;
        let depth = u32::try_from(depth).unwrap_or(u32::MAX);
        self.rows.push(Row { function, depth, start_ns, duration_ns, self_ns, ending });
    }
}

impl Output for Gathered {
    fn thread(&mut self, _: &Trace, thread: &Thread) -> io::Result<()> {
        self.thread = Some(Arc::new(thread.clone()));
        Ok(())
    }

    fn leave(&mut self, _: &Trace, _: &Thread, call: source::Call) -> io::Result<()> {
        let source::Call { function, depth, start_ns, end_ns, self_ns, ending } = call;
        let (duration_ns, self_ns) = if ending == Ending::Unknown { (0, 0) } else { (end_ns - start_ns, self_ns) };
        self.gather(Enter { function, depth, start_ns }, duration_ns, self_ns, Some(ending));
        Ok(())
    }

    fn point(&mut self, _: &Trace, _: &Thread, enter: Enter) -> io::Result<()> {
        self.gather(enter, 0, 0, None);
        Ok(())
    }

    fn end(self, _: &Trace) -> io::Result<()> {
        Ok(())
    }
}
