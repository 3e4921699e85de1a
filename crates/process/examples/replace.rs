//! Mends a function of a running program, and takes that back. A callback that counts its calls sees them all the while.
//!
//! `cargo run -p trapline-process --example replace`

use std::{
    error::Error,
    hint::black_box,
    sync::atomic::{AtomicU64, Ordering},
};

use trapline_process::{Addr, Filter, Tracer, traceable};

traceable! {
    /// Has a defect: it should have said 42.
    extern "C" fn answer() -> u32 {
        black_box(41)
    }
}

extern "C" fn right_answer() -> u32 {
    42
}

static CALLS: AtomicU64 = AtomicU64::new(0);

pub(crate) fn main() -> Result<(), Box<dyn Error>> {
    let tracer = Tracer::new()?;
    let answer_only = Filter::name("*::answer");
    let _count = tracer.ops("count").filter(answer_only.clone()).register(|_call| {
        CALLS.fetch_add(1, Ordering::Relaxed);
    })?;

    let before = answer();
    let place = Addr::new(right_answer as *const () as u64);
    // SAFETY: `right_answer` has the signature of `answer`, which is all that the filter selects.
    let fix = unsafe { tracer.ops("fix").filter(answer_only).replace(place) }?;
    let mended = answer();
    drop(fix);
    let after = answer();

    println!("before {before}, mended {mended}, as built {after}, {} calls", CALLS.load(Ordering::Relaxed));
    assert_eq!((before, mended, after, CALLS.load(Ordering::Relaxed)), (41, 42, 41, 3));
    Ok(())
}
