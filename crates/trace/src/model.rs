//! What a trace tells beside the events: where and how it was recorded, processes, threads, modules and their functions, and what is missing.
//!
//! Owns the types that the recorder hands to the [`Writer`](crate::Writer) and that the [`Catalog`](crate::Catalog) gives back. Most are stored as JSON, so
//! that fields can be added without a new version; a reader takes the default for a field that is not there. Invariant: the identifiers of
//! processes, modules and streams are the recorder's own numbers, each unique in a trace, however the system reuses its.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

/// Where, when and how a trace was recorded. Its first chunk.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct Meta {
    /// The version of the trapline that recorded.
    pub version: String,
    /// The machine's name.
    pub host: String,
    /// The kernel's name and version.
    pub kernel: String,
    /// The processor's name.
    pub cpu: String,
    /// The command as it was given.
    pub command: Vec<String>,
    /// Where it was given.
    pub directory: String,
    /// Nanoseconds from 1970 to the start, by the clock on the wall.
    pub started_unix_ns: u64,
    /// Ticks of the time-stamp counter in a second, as the system says; the calibration is more exact.
    pub tsc_hz: u64,
    /// The recorder's options, by name.
    pub options: BTreeMap<String, String>,
}

/// A file that was mapped into traced processes, with its functions. Its site ids are `first_site .. first_site + functions.len()`.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Module<'a> {
    /// The recorder's number for it.
    pub id: u32,
    /// Where it lies.
    pub path: &'a str,
    /// What the linker called this build of it.
    pub build_id: Option<&'a [u8]>,
    /// The site of its first function.
    pub first_site: u32,
    /// All of them, traced or not.
    pub functions: &'a [Function],
}

/// A function of a module.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Function {
    /// As people write it.
    pub name: String,
    /// In the file (a virtual address of its segments), not in memory.
    pub address: u64,
    /// In bytes.
    pub size: u64,
    /// Why it is not traced, as a short code; `None` if it is traced.
    pub untraced: Option<String>,
    /// More about the reason, for people; empty if there is nothing to say.
    pub detail: String,
}

/// How a process came to run what it runs.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum How {
    /// The recorder launched it.
    #[default]
    Launched,
    /// It ran already when the recorder came.
    Attached,
    /// It is the child of a fork.
    Fork,
    /// It is the child of a vfork, and shares its parent's memory for the while.
    Vfork,
    /// It replaced its program by another one: the same process as [`Process::parent`], with another memory.
    Exec,
}

/// One process running one program: after an exec it is another one here.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct Process {
    /// The recorder's number for it.
    pub id: u32,
    /// The system's.
    pub pid: u32,
    /// The recorder's number for the one that it came from.
    pub parent: Option<u32>,
    /// The arguments that it was started with.
    pub command: Vec<String>,
    /// The program's file.
    pub executable: String,
    /// The time-stamp counter when it started.
    pub started_tsc: u64,
    /// How it started.
    pub how: How,
}

/// A module that a process has mapped.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct Load {
    /// The process.
    pub process: u32,
    /// The module.
    pub module: u32,
    /// What has to be added to an address in the file for the address in memory, modulo 2^64.
    pub bias: u64,
    /// The time-stamp counter when it was mapped.
    pub tsc: u64,
}

/// A module that a process has mapped no more.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct Unload {
    /// The process.
    pub process: u32,
    /// The module.
    pub module: u32,
    /// The bias of the mapping that is gone.
    pub bias: u64,
    /// The time-stamp counter when it went.
    pub tsc: u64,
}

/// The events of one thread of one process.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct Stream {
    /// The recorder's number for it.
    pub id: u32,
    /// The process.
    pub process: u32,
    /// The system's number for the thread.
    pub tid: u32,
    /// The thread's name.
    pub name: String,
    /// The time-stamp counter when it was first seen.
    pub started_tsc: u64,
}

/// A process that has ended, or has gone on with another program.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct Exit {
    /// The process.
    pub process: u32,
    /// As `wait` gives it: the exit code shifted left by 8, or the number of the signal that killed it. `None` if nobody knows.
    pub status: Option<i32>,
    /// The time-stamp counter when it was seen to have ended.
    pub tsc: u64,
}

/// What is not in the trace, in records, by cause. Always of the whole trace up to here, so the last one counts.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct Losses {
    /// Records that found no free chunk (`--on-full drop`).
    pub full: u64,
    /// Records that were overwritten by later ones (`--on-full overwrite`).
    pub overwritten: u64,
    /// Words that were not written when their thread died or was interrupted for good. Those that the writer meets count themselves.
    pub torn: u64,
    /// Records that could not be written to the file. They count themselves.
    pub unwritten: u64,
    /// Calls that are recorded without their returns, for want of memory. Not lost, but they have no duration.
    pub unhooked: u64,
    /// Other causes, by name, in records.
    pub other: BTreeMap<String, u64>,
    /// Nanoseconds that threads waited for a free chunk. Not a loss either.
    pub waited_ns: u64,
}

impl Losses {
    /// Records that are not in the trace, whatever the cause.
    pub fn records(&self) -> u64 {
        let named = [self.full, self.overwritten, self.torn, self.unwritten];
        named.iter().chain(self.other.values()).fold(0, |sum, count| sum.saturating_add(*count))
    }
}

/// One moment on two clocks.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct ClockPoint {
    /// The time-stamp counter.
    pub tsc: u64,
    /// `CLOCK_MONOTONIC`, in nanoseconds.
    pub monotonic_ns: u64,
}

/// The last chunk of a trace that was finished: whether all is there.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct End {
    /// Chunks of events.
    pub event_chunks: u64,
    /// Records in them.
    pub records: u64,
    /// Calls among the records.
    pub calls: u64,
    /// What a record has cost its thread, in picoseconds, as far as the recorder could tell.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub record_ps: Option<u64>,
}
