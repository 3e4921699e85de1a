//! Hooks functions of this very program while its threads run them: counts calls, changes an argument, replaces a function.
//!
//! `cargo run --release -p trapline-process --example hook`

use std::{
    sync::atomic::{AtomicBool, AtomicU64, Ordering},
    thread,
    time::Duration,
};

use trapline_process::{Addr, Error, Filter, Tracer, traceable};

traceable! {
    /// Parses a header: the function that we want to know about.
    extern "C" fn parse_header(bytes: usize) -> usize {
        std::hint::black_box(bytes) + 1
    }

    /// Has a defect: it should have said 42.
    extern "C" fn answer() -> u32 {
        std::hint::black_box(41)
    }
}

extern "C" fn right_answer() -> u32 {
    42
}

static CALLS: AtomicU64 = AtomicU64::new(0);

fn main() -> Result<(), Error> {
    let tracer = Tracer::new()?;
    let names: Vec<String> = tracer.sites().map(|site| site.name).collect();
    println!("{} functions can be hooked, text is written through {}: {names:?}", names.len(), tracer.text_writer());

    let stop = AtomicBool::new(false);
    thread::scope(|scope| -> Result<(), Error> {
        for _ in 0..2 {
            scope.spawn(|| {
                while !stop.load(Ordering::Relaxed) {
                    parse_header(100);
                }
            });
        }
        let result = hook(&tracer);
        stop.store(true, Ordering::Relaxed);
        result
    })
}

fn hook(tracer: &Tracer) -> Result<(), Error> {
    let count = tracer.ops("count").filter(Filter::name("*::parse_header")).register(|_call| {
        CALLS.fetch_add(1, Ordering::Relaxed);
    })?;
    thread::sleep(Duration::from_millis(100));
    count.disable()?;
    println!("{} calls of parse_header in 100 ms", CALLS.load(Ordering::Relaxed));

    let double = tracer.ops("double").filter(Filter::name("*::parse_header")).register(|call| {
        // SAFETY: `parse_header` has one integer argument and takes any value.
        unsafe { call.set_arg(0, 2 * call.arg(0)) };
    })?;
    println!("parse_header(100) with its argument doubled: {}", parse_header(100));
    drop(double);
    println!("and without: {}", parse_header(100));

    let fix = tracer.ops("fix").filter(Filter::name("*::answer")).ip_modify().register(|call| {
        // SAFETY: `right_answer` has the signature of `answer`.
        unsafe { call.redirect(Addr::new(right_answer as *const () as u64)) };
    })?;
    println!("the answer, fixed: {}", answer());
    drop(fix);
    println!("the answer, as built: {}", answer());
    println!("{:?}", tracer.stats());

    match tracer.ops("typo").filter(Filter::name("parse_haeder")).register(|_call| ()) {
        Err(error) => println!("a filter with a typo: {error}"),
        Ok(_) => unreachable!("no function has that name"),
    }
    Ok(())
}
