//! Counts the calls of a function that other threads are making all the while.
//!
//! `cargo run -p trapline-process --example count`

use std::{
    error::Error,
    hint::black_box,
    sync::atomic::{AtomicBool, AtomicU64, Ordering},
    thread,
};

use trapline_process::{Filter, Tracer, traceable};

traceable! {
    /// The function that we want to know about.
    extern "C" fn parse_header(bytes: usize) -> usize {
        black_box(bytes) + 1
    }
}

const THREADS: usize = 4;
const ENOUGH: u64 = 100_000;

static SEEN: AtomicU64 = AtomicU64::new(0);
static IS_ATTACHED: AtomicBool = AtomicBool::new(false);
static IS_OVER: AtomicBool = AtomicBool::new(false);

/// Calls the function, and counts the calls that begin after it is known that the callback is attached.
fn work() -> u64 {
    let mut due = 0;
    while !IS_OVER.load(Ordering::SeqCst) {
        let is_due = IS_ATTACHED.load(Ordering::SeqCst);
        parse_header(100);
        due += u64::from(is_due);
    }
    due
}

pub(crate) fn main() -> Result<(), Box<dyn Error>> {
    let tracer = Tracer::new()?;
    let threads: Vec<_> = (0..THREADS).map(|_| thread::spawn(work)).collect();

    // The callback runs before the function's first instruction, in the thread that calls it.
    let count = tracer.ops("count").filter(Filter::name("*::parse_header")).register(|_call| {
        SEEN.fetch_add(1, Ordering::Relaxed);
    })?;
    IS_ATTACHED.store(true, Ordering::SeqCst);
    let begin = SEEN.load(Ordering::Relaxed);
    while SEEN.load(Ordering::Relaxed) - begin < ENOUGH {
        thread::yield_now();
    }
    IS_OVER.store(true, Ordering::SeqCst);
    let due: u64 = threads.into_iter().map(|thread| thread.join().expect("it does not panic")).sum();
    drop(count);

    let seen = SEEN.load(Ordering::Relaxed);
    parse_header(100);
    println!("seen {seen} calls; {due} of them had to be seen");
    assert!(due > 0 && seen >= due && SEEN.load(Ordering::Relaxed) == seen);
    Ok(())
}
