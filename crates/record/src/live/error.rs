//! Why a patch was not applied or reverted, each with what to do next.

use std::{fmt, io, time::Duration};

use trapline_engine::Addr;
use trapline_patch::LinkError;

use crate::{refusal::Refusal, sys::Tid};

/// Why a patch was not applied or reverted. The process is as before.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum LiveError {
    /// The process cannot be patched.
    #[error("cannot patch process {pid}: {reason}")]
    NotPatchable {
        /// The process.
        pid: Tid,
        /// Why.
        reason: Refusal,
    },
    /// Another command is at work.
    #[error("another trapline is patching process {pid}; wait until it is done")]
    InUse {
        /// The process.
        pid: Tid,
    },
    /// The patch is for code of another width.
    #[error(
        "the patch is for code of {patch} bit, and the process is one of {process} bit; build it for what the process runs"
    )]
    Width {
        /// The patch's.
        patch: u32,
        /// The process's.
        process: u32,
    },
    /// Exceptions could not go through new code.
    #[error(
        "{object} throws exceptions, and it cannot be told of the new code: one that goes through it would end the process; if none does, say --force"
    )]
    Unwinding {
        /// The unwinder's file.
        object: String,
    },
    /// A callback was against it.
    #[error("{callback} of the patch answered {answer}: {}", if *.is_apply { "nothing was applied" } else { "the patch stays" })]
    Vetoed {
        /// Which one.
        callback: String,
        /// What it said.
        answer: i32,
        /// Whether the patch was to be applied.
        is_apply: bool,
    },
    /// A callback did not come back.
    #[error(
        "{callback} of the patch {what}; the thread that called it was taken back to where it was, but what it did before is done"
    )]
    Callback {
        /// Which one.
        callback: String,
        /// What became of it.
        what: String,
    },
    /// The process has not loaded what the patch is for.
    #[error("the patch is for {target} with build-id {wanted}, {found}; build it for what the process runs")]
    NotLoaded {
        /// The file's name.
        target: String,
        /// Its build-id.
        wanted: String,
        /// What there is instead.
        found: String,
    },
    /// A function's code is not the file's.
    #[error(
        "the code of {function} at {at} is not what the patch expects: a debugger's breakpoint, an armed recorder, or another patch has changed it; end that first"
    )]
    OtherCode {
        /// The function.
        function: String,
        /// Where it is.
        at: Addr,
    },
    /// There is no room for a jump.
    #[error("{function} is shorter than the 5 bytes of a jump; patch its callers instead")]
    TooShort {
        /// The function.
        function: String,
    },
    /// The memory around the target is full.
    #[error("there is no room for {len_bytes} bytes within reach of the target; make the patch smaller")]
    NoRoom {
        /// How much was looked for.
        len_bytes: u64,
    },
    /// The patch does not fit.
    #[error(transparent)]
    Link(#[from] LinkError),
    /// Somebody was in the functions until the deadline.
    #[error("given up after {} s and {stops} stops, with nothing changed: {blocked}", .waited.as_secs_f32())]
    Busy {
        /// How long it was tried.
        waited: Duration,
        /// How often the threads were stopped.
        stops: u32,
        /// Who.
        blocked: Box<Blocked>,
    },
    /// The threads did not stand still.
    #[error("given up after {} s: not all threads could be stopped; one may wait in the kernel, as after vfork, or get no processor", .waited.as_secs_f32())]
    Unstoppable {
        /// How long it was tried.
        waited: Duration,
    },
    /// There is nothing to revert.
    #[error("process {pid} has no such patch; active: {}", if .names.is_empty() { "none" } else { .names })]
    NoSuchPatch {
        /// The process.
        pid: Tid,
        /// What is active.
        names: String,
    },
    /// There are several.
    #[error("several patches are active: {names}; say which")]
    WhichPatch {
        /// What is active.
        names: String,
    },
    /// It was forced.
    #[error("{name} was applied by --force: nobody can tell whether it can be taken back; restart the process")]
    Tainted {
        /// The patch.
        name: String,
    },
    /// A recorder has the process, and is coming or going.
    #[error("the recorder of process {pid} was just coming or leaving; try it again")]
    RecorderLeaves {
        /// The process.
        pid: Tid,
    },
    /// The recorder that has the process says so.
    #[error("{text}")]
    ByRecorder {
        /// Its words.
        text: String,
        /// Whether something failed, which it should not have.
        is_failure: bool,
    },
    /// A call of the operating system failed.
    #[error("process {pid}: {doing}: {source}")]
    System {
        /// The process.
        pid: Tid,
        /// What was being done.
        doing: &'static str,
        /// The kernel's answer.
        source: io::Error,
    },
}

impl LiveError {
    pub(super) fn system(pid: Tid, doing: &'static str, source: io::Error) -> Self {
        Self::System { pid, doing, source }
    }

    /// Whether a recorder is in the way, which goes again: it traces the process, or came in the middle, and traces its threads or has taken the memory that was free.
    pub(super) fn may_pass(&self) -> bool {
        match self {
            Self::NotPatchable { reason, .. } => reason.is_of_recorder(),
            Self::RecorderLeaves { .. } => true,
            Self::System { source, .. } => {
                matches!(source.kind(), io::ErrorKind::PermissionDenied | io::ErrorKind::AlreadyExists)
            }
            _ => false,
        }
    }
}

/// A thread that was in the way.
#[derive(Clone, Debug)]
pub struct Blocked {
    /// The thread.
    pub tid: Tid,
    /// What it calls itself.
    pub thread: String,
    /// What it was in.
    pub function: String,
    /// What says so.
    pub how: String,
    /// What may be its callers, from the innermost.
    pub backtrace: Vec<String>,
}

impl fmt::Display for Blocked {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "thread {} ({}) is in {} ({})", self.tid, self.thread, self.function, self.how)?;
        self.backtrace.iter().try_for_each(|frame| write!(f, "\n  {frame}"))
    }
}
