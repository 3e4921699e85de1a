//! What becomes of records that find no room: each is kept or counted (I3), whatever the mode, and nobody waits for ever.

mod common;

use std::{
    process::Command,
    sync::{
        Barrier,
        atomic::{AtomicBool, AtomicU32, Ordering},
    },
};

use common::{CHUNK_RECORDS, Contents, Pool, calls, in_thread, stub_one, stub_point, stub_two, tid};
use trapline_abi::{
    agent::{ALL_FORBIDDEN, Call},
    pool::OnFull,
};
use trapline_agent::arch;

const THREADS: usize = 8;
const CALLS: u64 = 60_000;

/// Threads that call while another one drains. Returns what was in the chunks.
fn run(pool: &Pool, drains: bool) -> Contents {
    let mut contents = Contents::default();
    let ended: Vec<AtomicU32> = (0..THREADS).map(|_| AtomicU32::new(0)).collect();
    let is_over = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let drain = scope.spawn(|| {
            let mut contents = Contents::default();
            loop {
                // The last look is after the last thread's end.
                let is_last = is_over.load(Ordering::Acquire);
                if drains {
                    for tid in &ended {
                        pool.end(tid.swap(0, Ordering::Acquire));
                    }
                    pool.drain(&mut contents);
                } else {
                    pool.header().heartbeat.fetch_add(1, Ordering::Relaxed);
                }
                if is_last {
                    return contents;
                }
                std::thread::yield_now();
            }
        });
        let threads: Vec<_> = ended
            .iter()
            .map(|ended| {
                scope.spawn(|| {
                    calls(CALLS / 2, stub_one);
                    calls(CALLS / 2, stub_two);
                    calls(1, stub_point);
                    ended.store(tid(), Ordering::Release);
                })
            })
            .collect();
        for thread in threads {
            thread.join().unwrap();
        }
        is_over.store(true, Ordering::Release);
        contents = drain.join().unwrap();
    });
    contents
}

/// The records of one run: two for each call whose return is seen, one for the others.
const MADE: u64 = THREADS as u64 * (2 * CALLS + 1);

/// What is kept and what is lost.
fn accounted(pool: &Pool, contents: &Contents) -> (u64, u64) {
    assert_eq!((contents.holes, contents.broken), (0, 0));
    let header = pool.header();
    let lost = header.lost_full.load(Ordering::Relaxed) + header.lost_overwritten.load(Ordering::Relaxed);
    (contents.records(), lost)
}

/// As the agent has it.
fn word(calls: u64) -> usize {
    usize::try_from(calls).expect("there are far fewer than bits")
}

#[test]
fn blocking_loses_nothing() {
    let pool = Pool::new(THREADS + 3, OnFull::Block);
    let contents = run(&pool, true);
    assert_eq!(accounted(&pool, &contents), (MADE, 0));
    assert_eq!(contents.calls[&1], THREADS as u64 * CALLS / 2);
    assert_eq!(contents.calls[&2], contents.calls[&1]);
    assert_eq!(contents.calls[&3], THREADS as u64);
}

#[test]
fn blocking_loses_nothing_with_fewer_chunks_than_threads() {
    let pool = Pool::new(3, OnFull::Block);
    let contents = run(&pool, true);
    assert_eq!(accounted(&pool, &contents), (MADE, 0));
    assert_ne!(pool.header().waited_tsc.load(Ordering::Relaxed), 0);
}

#[test]
fn blocking_without_system_calls_loses_nothing() {
    let pool = Pool::new(3, OnFull::Block);
    // A new thread asks for its number once, and for memory.
    let asked = [Call::Getpid, Call::Gettid, Call::Mmap].map(Call::bit);
    arch::config_forbidden().store(word(ALL_FORBIDDEN & !asked.iter().sum::<u64>()), Ordering::SeqCst);
    let contents = run(&pool, true);
    assert_eq!(accounted(&pool, &contents), (MADE, 0));
}

#[test]
fn threads_that_cannot_know_who_they_are_are_counted() {
    let pool = Pool::new(3, OnFull::Block);
    arch::config_forbidden().store(word(ALL_FORBIDDEN), Ordering::SeqCst);
    let contents = run(&pool, true);
    let unhooked = pool.header().unhooked.load(Ordering::Relaxed);
    // Stacks of threads before them may have their shadow: then the loss is of two records.
    assert_eq!(accounted(&pool, &contents), (0, MADE - unhooked));
}

#[test]
fn dropping_counts_exactly_what_it_drops() {
    let pool = Pool::new(THREADS + 1, OnFull::Drop);
    let contents = run(&pool, true);
    let (kept, lost) = accounted(&pool, &contents);
    assert_eq!(kept + lost, MADE);
    assert!(kept >= CHUNK_RECORDS as u64);
}

#[test]
fn dropping_without_a_recorder_keeps_what_has_room() {
    let pool = Pool::new(THREADS + 1, OnFull::Drop);
    run(&pool, false);
    let contents = pool.contents().unwrap();
    let (kept, lost) = accounted(&pool, &contents);
    assert_eq!((kept, kept + lost), ((THREADS as u64 + 1) * CHUNK_RECORDS as u64, MADE));
}

#[test]
fn overwriting_counts_exactly_what_it_overwrites() {
    let pool = Pool::new(2 * THREADS, OnFull::Overwrite);
    run(&pool, false);
    let contents = pool.contents();
    // The oldest chunks of a thread are gone: its others are still in order, and none is missing between them.
    let (kept, lost) = accounted(&pool, &contents.unwrap());
    assert_eq!(kept + lost, MADE);
    assert!(lost > MADE / 2, "{lost}");
}

#[test]
fn a_count_that_is_wrong_by_one_is_found() {
    let pool = Pool::new(THREADS + 3, OnFull::Block);
    let mut contents = run(&pool, true);
    *contents.calls.get_mut(&1).unwrap() -= 1;
    assert_ne!(accounted(&pool, &contents), (MADE, 0));
}

#[test]
fn a_dead_recorder_stops_nobody() {
    let pool = Pool::new(2, OnFull::Block);
    let mut gone = Command::new("true").spawn().unwrap();
    pool.header().recorder.store(gone.id(), Ordering::Relaxed);
    gone.wait().unwrap();
    in_thread(|| calls(CALLS, stub_one));
    assert_eq!(pool.header().closed.load(Ordering::Relaxed), 1);
    assert_eq!(pool.contents().unwrap().records(), 2 * CHUNK_RECORDS as u64);
}

#[test]
fn chunks_that_idle_threads_hold_stop_nobody_and_what_is_lost_is_counted() {
    let pool = Pool::new(2, OnFull::Block);
    let (have_chunks, may_end) = (Barrier::new(3), Barrier::new(3));
    std::thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| {
                calls(1, stub_one);
                have_chunks.wait();
                may_end.wait();
            });
        }
        have_chunks.wait();
        in_thread(|| calls(1000, stub_one));
        may_end.wait();
    });
    assert_eq!(accounted(&pool, &pool.contents().unwrap()), (4, 2000));
    assert_eq!(pool.header().closed.load(Ordering::Relaxed), 0, "the recorder lives");
}
