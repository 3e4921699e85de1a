//! What is mapped, and a watch for pages that are writable and executable at once (I8).

use std::{
    fs,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    thread::{self, JoinHandle},
};

use super::child::wait_until;

/// The lines of /proc/self/maps with pages that can be written and executed.
pub(crate) fn writable_code() -> Vec<String> {
    let maps = fs::read_to_string("/proc/self/maps").expect("procfs");
    let both = |line: &&str| {
        let access = line.split_whitespace().nth(1).unwrap_or_default();
        access.contains('w') && access.contains('x')
    };
    maps.lines().filter(both).map(str::to_owned).collect()
}

/// A thread that looks again and again for pages that are writable and executable.
pub(crate) struct Watch {
    shared: Arc<Shared>,
    thread: JoinHandle<Vec<String>>,
}

#[derive(Default)]
struct Shared {
    end: AtomicBool,
    looks: AtomicU64,
}

impl Watch {
    pub(crate) fn start() -> Self {
        let shared = Arc::<Shared>::default();
        let watched = Arc::clone(&shared);
        let thread = thread::spawn(move || {
            let mut found = Vec::new();
            while found.is_empty() && !watched.end.load(Ordering::Relaxed) {
                found = writable_code();
                watched.looks.fetch_add(1, Ordering::Relaxed);
            }
            found
        });
        let watch = Self { shared, thread };
        watch.await_look();
        watch
    }

    /// Waits until it has looked once more, from beginning to end, or has found something.
    pub(crate) fn await_look(&self) {
        let seen = self.looks();
        wait_until(|| self.looks() >= seen + 2 || self.thread.is_finished());
    }

    pub(crate) fn looks(&self) -> u64 {
        self.shared.looks.load(Ordering::Relaxed)
    }

    /// Ends it, and returns what it has found.
    pub(crate) fn finish(self) -> Vec<String> {
        self.shared.end.store(true, Ordering::Relaxed);
        self.thread.join().expect("it only reads")
    }
}
