//! Rust panics: caught, with destructors on the way, resumed, in threads, and with a payload of our own.
use std::cell::Cell;
use std::hint::black_box;
use std::panic::{self, AssertUnwindSafe};

thread_local!(static DROPPED: Cell<u64> = const { Cell::new(0) });

struct Guard;

impl Drop for Guard {
    fn drop(&mut self) {
        DROPPED.with(|dropped| dropped.set(dropped.get() + 1));
    }
}

#[inline(never)]
#[unsafe(no_mangle)]
fn panics_below(depth: u64) -> u64 {
    let _guard = Guard;
    if black_box(depth) == 0 {
        panic!("the bottom");
    }
    black_box(panics_below(depth - 1)) + 1
}

#[inline(never)]
#[unsafe(no_mangle)]
fn resumes(depth: u64) -> u64 {
    match panic::catch_unwind(|| panics_below(depth)) {
        Ok(value) => value,
        Err(payload) => {
            let _guard = Guard;
            panic::resume_unwind(payload)
        }
    }
}

#[inline(never)]
#[unsafe(no_mangle)]
fn all() -> u64 {
    let mut caught = 0;
    for round in 0..20 {
        caught += u64::from(panic::catch_unwind(|| panics_below(30)).is_err());
        caught += u64::from(panic::catch_unwind(|| resumes(10)).is_err());
        let payload = panic::catch_unwind(|| panic::panic_any(round)).expect_err("it panics");
        caught += payload.downcast_ref::<i32>().map_or(0, |&value| value as u64);
        let mut list = vec![1, 2, 3];
        let outside = panic::catch_unwind(AssertUnwindSafe(|| list[black_box(7)] = 1));
        caught += u64::from(outside.is_err());
    }
    caught * 1_000_000 + DROPPED.with(Cell::get)
}

fn main() {
    panic::set_hook(Box::new(|_| {}));
    println!("alone {}", all());
    let threads: Vec<_> = (0..4).map(|_| std::thread::spawn(|| all())).collect();
    for thread in threads {
        println!("thread {}", thread.join().expect("it catches what it throws"));
    }
    let lost = std::thread::spawn(|| panics_below(3)).join();
    println!("joined {}", lost.is_err());
    println!("calls all 5");
    println!("calls resumes {}", 5 * 20);
    println!("calls panics_below {}", 5 * 20 * (31 + 11) + 4);
    std::process::exit(7);
}
