// Threads that panic in a function, through a second, to a third, all of which are patched. Each line of input is answered by one, as in pair.c: calls, results that were
// wrong, the version now, and whether a static counter goes on.
use std::{
    cell::Cell,
    io::{BufRead, stdin},
    panic::{catch_unwind, resume_unwind},
    process::exit,
    sync::atomic::{AtomicU64, Ordering::Relaxed},
    thread,
    time::Duration,
};

const VERSION: u32 = if cfg!(new) { 2 } else { 1 };

static CALLS: AtomicU64 = AtomicU64::new(0);
static WRONG: AtomicU64 = AtomicU64::new(0);
static BEGUN: AtomicU64 = AtomicU64::new(0);
static COUNTED: AtomicU64 = AtomicU64::new(0);

thread_local! {
    static LEFT: Cell<u64> = const { Cell::new(0) };
}

struct Guard;

impl Drop for Guard {
    fn drop(&mut self) {
        LEFT.set(LEFT.get() + 1);
    }
}

#[inline(never)]
fn pitch(speed: u32) -> u32 {
    COUNTED.fetch_add(1, Relaxed);
    if speed < 1 << 20 {
        resume_unwind(Box::new((speed, VERSION)));
    }
    speed
}

#[inline(never)]
fn between(speed: u32) -> u32 {
    let _guard = Guard;
    pitch(speed) + VERSION
}

/// What was thrown, who threw it, and who caught it.
#[inline(never)]
fn attempt(speed: u32) -> u32 {
    let before = LEFT.get();
    let Err(thrown) = catch_unwind(|| between(speed)) else { return 0 };
    let Some((speed, version)) = thrown.downcast_ref::<(u32, u32)>() else { return 0 };
    if LEFT.get() != before + 1 {
        return 0;
    }
    speed * 100 + version * 10 + VERSION
}

fn panic_for_ever() {
    let mut is_first = true;
    for speed in (0..4096).cycle() {
        let versions = attempt(speed).wrapping_sub(speed * 100);
        if versions != 11 && versions != 22 {
            WRONG.fetch_add(1, Relaxed);
        }
        CALLS.fetch_add(1, Relaxed);
        // What the C library has for a thread comes with its first panic.
        if is_first {
            is_first = false;
            BEGUN.fetch_add(1, Relaxed);
        }
        // Elsewhere, most of the time.
        for step in 0..200_000 {
            std::hint::black_box(step);
        }
    }
}

fn main() {
    // Whatever becomes of the check, this ends.
    thread::spawn(|| {
        thread::sleep(Duration::from_secs(300));
        exit(14);
    });
    for _ in 0..4 {
        thread::spawn(panic_for_ever);
    }
    while BEGUN.load(Relaxed) < 4 {
        thread::yield_now();
    }
    println!("ready");
    for line in stdin().lock().lines() {
        if line.is_err() {
            break;
        }
        let (before, counted) = (CALLS.load(Relaxed), COUNTED.load(Relaxed));
        while CALLS.load(Relaxed) < before + 200 {
            thread::yield_now();
        }
        let goes_on = COUNTED.load(Relaxed) >= counted + 190;
        println!("{} {} {} {}", CALLS.load(Relaxed), WRONG.load(Relaxed), attempt(0) / 10, i32::from(goes_on));
    }
}
