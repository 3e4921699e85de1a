//! The threads that are traced, and what the kernel says of any.
//!
//! Owns [`Task`], what the [tracer](crate::tracer) knows of a thread, and what it reads of a thread's `status`.

use std::fs;

use trapline_engine::Addr;

use crate::{drain::SpaceId, exec::NewImage, sys::Tid};

/// A thread, or the only thread of a process.
#[derive(Debug)]
pub(super) struct Task {
    /// Its process: an id of [`Tracer::processes`].
    pub(super) process: u32,
    /// Whose memory it uses; `None` if that is not traced.
    pub(super) space: Option<SpaceId>,
    /// An image that is being loaded.
    pub(super) loading: Option<Box<NewImage>>,
    /// Its id as it sees it itself.
    pub(super) tid_inside: u32,
    /// What a sandbox forbids it, whatever it executes.
    pub(super) forbidden: u64,
    /// Its thread state, while a vfork child goes on with that.
    pub(super) lent: Option<Lent>,
    /// The pointer to its state, if the recorder has given it one.
    pub(super) given: Option<Addr>,
    /// Whether it is a new thread that is to get one.
    pub(super) is_to_be_given: bool,
}

impl Task {
    /// One of which nothing is known yet.
    pub(super) fn new(process: u32, tid_inside: u32) -> Self {
        Self {
            process,
            space: None,
            loading: None,
            tid_inside,
            forbidden: 0,
            lent: None,
            given: None,
            is_to_be_given: false,
        }
    }
}

/// What a vfork child has borrowed.
#[derive(Clone, Debug)]
pub(super) struct Lent {
    /// Where the [`Thread`] lies.
    pub(super) thread: Addr,
    /// What it was.
    pub(super) state: Vec<u8>,
}

/// A field of a thread's `status`.
pub(super) fn status_field(tid: Tid, name: &str) -> Option<String> {
    let status = fs::read_to_string(format!("/proc/{tid}/status")).ok()?;
    status.lines().find_map(|line| line.strip_prefix(name)).map(|value| value.trim().to_owned())
}

/// The id of a thread's process.
pub(crate) fn thread_group(tid: Tid) -> Option<Tid> {
    status_field(tid, "Tgid:")?.parse().ok()
}

/// A thread's id as its own pid namespace numbers it.
pub(crate) fn id_inside(tid: Tid) -> u32 {
    let ids = status_field(tid, "NSpid:");
    let inside = ids.as_deref().and_then(|ids| ids.split_whitespace().last()).and_then(|id| id.parse().ok());
    inside.unwrap_or(tid.cast_unsigned())
}
