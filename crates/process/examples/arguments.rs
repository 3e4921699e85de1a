//! Logs what a function is called with.
//!
//! `cargo run -p trapline-process --example arguments`

use std::{
    error::Error,
    hint::black_box,
    sync::atomic::{AtomicUsize, Ordering},
};

use trapline_process::{Addr, Filter, Tracer, traceable};

traceable! {
    /// The function that we want to know about.
    extern "C" fn deposit(account: usize, cents: isize) -> isize {
        black_box(account);
        black_box(cents)
    }
}

const ROOM: usize = 64;

/// A callback runs in the middle of anything: so it writes to memory that is there, without a lock, and something else prints it later.
struct Log {
    entries: [[AtomicUsize; 3]; ROOM],
    count: AtomicUsize,
}

impl Log {
    fn note(&self, words: [usize; 3]) {
        let index = self.count.fetch_add(1, Ordering::Relaxed);
        if let Some(entry) = self.entries.get(index) {
            for (place, word) in entry.iter().zip(words) {
                place.store(word, Ordering::Release);
            }
        }
    }
}

static LOG: Log = Log { entries: [const { [const { AtomicUsize::new(0) }; 3] }; ROOM], count: AtomicUsize::new(0) };

pub(crate) fn main() -> Result<(), Box<dyn Error>> {
    let tracer = Tracer::new()?;
    // What the arguments are only the function's declaration tells.
    let log = tracer.ops("log").filter(Filter::name("*::deposit")).register(|call| {
        #[expect(clippy::cast_possible_truncation, reason = "an address of the own process")]
        LOG.note([call.arg(0), call.arg(1), call.return_address().value() as usize]);
    })?;
    deposit(17, 1250);
    deposit(4, -300);
    drop(log);
    deposit(17, 1);

    let count = LOG.count.load(Ordering::Relaxed);
    for entry in LOG.entries.iter().take(count) {
        let [account, cents, caller] = [0, 1, 2].map(|word| entry[word].load(Ordering::Acquire));
        println!("deposit({account}, {}) from {}", cents.cast_signed(), Addr::new(caller as u64));
    }
    let last = [0, 1].map(|word| LOG.entries[1][word].load(Ordering::Acquire).cast_signed());
    assert_eq!((count, last), (2, [4, -300]));
    Ok(())
}
