//! Hooking the functions of the own process while its threads run them: which calls are seen.
//!
//! The tests here toggle ops while four threads judge each of their calls; [`arguments`](mod@arguments) are about what callbacks see and
//! change, [`contexts`](mod@contexts) about callbacks that are interrupted or call traced functions, [`lifetime`](mod@lifetime) about what is
//! there before, meanwhile and afterwards, [`replacement`](mod@replacement) about functions that stand for others. Every test runs in a process of its own.

#[path = "hooks/arguments.rs"]
mod arguments;
mod common;
#[path = "hooks/contexts.rs"]
mod contexts;
#[path = "hooks/lifetime.rs"]
mod lifetime;
#[path = "hooks/replacement.rs"]
mod replacement;

use std::hint::black_box;

use common::{
    calls::{Tally, Watched, Workers, count, seen, toggle_until_trapped},
    child::in_child,
    fixture::{Compiled, Library, function},
    maps,
};
use trapline_process::{Filter, Resume, TextWriter, Tracer, traceable};

traceable! {
    /// The function that workers call.
    extern "C" fn doubled(a: usize) -> usize {
        black_box(a) * 2
    }

    /// Another one.
    extern "C" fn tripled(a: usize) -> usize {
        black_box(a) * 3
    }
}

/// How often ops are turned on and off in most of the tests.
const ROUNDS: usize = 100;
const THREADS: usize = 4;

/// What resumes a call at this width, and loses none.
const STRATEGIES: &[Resume] =
    if cfg!(target_arch = "x86_64") { &[Resume::Slots, Resume::Push, Resume::R11] } else { &[Resume::Slots] };

fn call_doubled() {
    assert_eq!(doubled(21), 42);
}

/// Registers [`count`] on the functions that a glob matches, disabled.
fn watched<const WATCH: usize>(tracer: &Tracer, glob: &str) -> Watched {
    let ops = tracer.ops("watched").filter(Filter::name(glob)).disabled().register(count::<WATCH>);
    Watched::new(ops.expect("the function is there"), WATCH)
}

/// Toggles an ops while threads call its function, and meet breakpoints.
fn toggle_under_load(tracer: &Tracer, rounds: usize) {
    let ops = watched::<0>(tracer, "*doubled*");
    let workers = Workers::start(THREADS, &[0], call_doubled);
    ops.toggle(rounds, &workers);
    toggle_until_trapped(tracer, || ops.blink());
    workers.assert_exact(0);
}

#[test]
fn every_call_is_seen_from_the_return_of_enable_to_the_call_of_disable() {
    in_child("every_call_is_seen_from_the_return_of_enable_to_the_call_of_disable", || {
        let tracer = Tracer::new().expect("a tracer");
        assert_eq!(tracer.text_writer(), TextWriter::ProcMem);
        toggle_under_load(&tracer, 300);
        let stats = tracer.stats();
        assert!(stats.batches >= 2 * (300 + 1) && stats.batches.is_multiple_of(2), "{stats:?}");
        assert_eq!((stats.pokes, stats.syncs), (stats.batches, 3 * stats.batches));
        assert_eq!((stats.traps.overflows, stats.traps.skipped), (0, 0));
    });
}

#[test]
fn no_call_is_missed_when_text_is_written_by_remapping_pages() {
    in_child("no_call_is_missed_when_text_is_written_by_remapping_pages", || {
        let tracer = Tracer::builder().text_writer(TextWriter::Remap).build().expect("a tracer");
        assert_eq!(tracer.text_writer(), TextWriter::Remap);
        toggle_under_load(&tracer, ROUNDS);
    });
}

#[test]
fn no_call_is_missed_by_any_strategy_of_this_width() {
    in_child("no_call_is_missed_by_any_strategy_of_this_width", || {
        for resume in STRATEGIES {
            toggle_under_load(&Tracer::builder().resume(*resume).build().expect("a tracer"), ROUNDS);
        }
    });
}

#[test]
fn an_ops_sees_every_call_while_another_one_comes_and_goes() {
    in_child("an_ops_sees_every_call_while_another_one_comes_and_goes", || {
        let tracer = Tracer::new().expect("a tracer");
        let tallies = share_a_site(&tracer);
        assert!(tallies.iter().all(|tally| tally.is_exact() && tally.due > 0 && tally.idle == 0), "{tallies:?}");
    });
}

#[test]
fn skipping_the_instruction_loses_calls() {
    in_child("skipping_the_instruction_loses_calls", || {
        // The negative control of all that is above: what the judges are for.
        let tracer = Tracer::builder().resume(Resume::Skip).build().expect("a tracer");
        let mut tally = Tally::default();
        while tally.missed == 0 {
            tally += share_a_site(&tracer).into_iter().sum();
        }
        assert!(tracer.stats().traps.skipped > 0, "{tally:?}");
        assert_eq!((tally.repeated, tally.stray), (0, 0));
    });
}

/// What the threads found about an ops that stays while another one on its site is toggled.
fn share_a_site(tracer: &Tracer) -> Vec<Tally> {
    let (stays, toggled) = (watched::<0>(tracer, "*doubled*"), watched::<1>(tracer, "*doubled*"));
    stays.enable();
    let workers = Workers::start(THREADS, &[0, 1], call_doubled);
    toggled.toggle(ROUNDS, &workers);
    toggle_until_trapped(tracer, || toggled.blink());
    // With a third one there are lists on either side of the change.
    let third = watched::<2>(tracer, "*d*bled*");
    third.enable();
    toggled.toggle(ROUNDS / 2, &workers);
    third.drop_enabled();
    workers.await_each();
    workers.finish().into_iter().map(|tallies| tallies[0]).collect()
}

#[test]
fn unregistering_and_registering_again_misses_nothing() {
    in_child("unregistering_and_registering_again_misses_nothing", || {
        let tracer = Tracer::new().expect("a tracer");
        let stays = watched::<0>(&tracer, "*doubled*");
        stays.enable();
        let workers = Workers::start(THREADS, &[0, 1], call_doubled);
        for _ in 0..ROUNDS {
            // Each time with a trampoline of its own; the old ones are reclaimed while the threads run.
            let comes_and_goes = watched::<1>(&tracer, "*doubled*");
            comes_and_goes.enable();
            workers.await_calls(10);
            comes_and_goes.drop_enabled();
            workers.await_calls(10);
        }
        workers.await_each();
        let tallies = workers.finish();
        assert!(tallies.iter().all(|[kept, toggled, ..]| kept.is_exact() && toggled.is_exact()), "{tallies:?}");
        assert!(tallies.iter().all(|[kept, ..]| kept.due > 0), "{tallies:?}");
        let toggled: Tally = tallies.iter().map(|tallies| tallies[1]).sum();
        assert!(toggled.due > 0 && toggled.idle > 0, "{toggled:?}");
    });
}

fn toggle_compiled(compiled: Compiled) {
    if !compiled.is_possible() {
        eprintln!("skipped: no {compiled:?} at this width, or no compiler for it");
        return;
    }
    let library = compiled.load("hooks_functions.c");
    let tracer = Tracer::new().expect("a tracer");
    let ops = watched::<0>(&tracer, "hooks_*");
    let call = calls_of(&library);
    let workers = Workers::start(THREADS, &[0], call);
    ops.toggle(ROUNDS, &workers);
    toggle_until_trapped(&tracer, || ops.blink());
    workers.assert_exact(0);
    let stats = tracer.stats();
    assert_eq!(stats.pokes, 3 * stats.batches, "three functions each: {stats:?}");
}

/// Calls the functions of a library one after the other, and checks their results.
fn calls_of(library: &Library) -> impl FnMut() + Clone + Send + 'static {
    type Unary = extern "C" fn(libc::c_long) -> libc::c_long;
    // SAFETY: the fixture declares it so, and the library stays until the tracer is gone.
    let double: Unary = unsafe { function(library, "hooks_double") };
    // SAFETY: as above.
    let triple: Unary = unsafe { function(library, "hooks_triple") };
    // SAFETY: as above.
    let weigh: arguments::Weigh = unsafe { function(library, "hooks_weigh") };
    let mut turn = 0;
    move || {
        turn = (turn + 1) % 3;
        match turn {
            0 => assert_eq!(double(21), 42),
            1 => assert_eq!(triple(21), 63),
            _ => assert_eq!(weigh(1, 2, 3, 4, 5, 6, 7, 8), 87_654_321),
        }
    }
}

#[test]
fn patchable_function_entries_are_toggled_without_a_miss() {
    in_child("patchable_function_entries_are_toggled_without_a_miss", || toggle_compiled(Compiled::Patchable));
}

#[test]
fn fentry_nops_are_toggled_without_a_miss() {
    in_child("fentry_nops_are_toggled_without_a_miss", || toggle_compiled(Compiled::Fentry));
}

#[test]
fn xray_sleds_are_toggled_without_a_miss() {
    in_child("xray_sleds_are_toggled_without_a_miss", || toggle_compiled(Compiled::Xray));
}

#[test]
fn all_ops_of_a_site_run() {
    in_child("all_ops_of_a_site_run", || {
        let tracer = Tracer::new().expect("a tracer");
        let both = watched::<0>(&tracer, "*[dt]*led*");
        let one = watched::<1>(&tracer, "*doubled*");
        let other = watched::<2>(&tracer, "*tripled*");
        for ops in [&both, &one, &other] {
            ops.enable();
        }
        let before = [0, 1, 2].map(seen);
        assert_eq!((doubled(1), doubled(2), tripled(3)), (2, 4, 9));
        let after = [0, 1, 2].map(seen);
        assert_eq!([0, 1, 2].map(|watch| after[watch] - before[watch]), [3, 2, 1]);
        one.disable();
        assert_eq!((doubled(1), tripled(3)), (2, 9));
        assert_eq!([0, 1, 2].map(|watch| seen(watch) - after[watch]), [2, 0, 1]);
    });
}

#[test]
fn a_changed_filter_leaves_no_gap_where_both_match() {
    in_child("a_changed_filter_leaves_no_gap_where_both_match", || {
        let tracer = Tracer::new().expect("a tracer");
        let (all, one) = (Filter::name("*doubled*").or_name("*tripled*"), Filter::name("*doubled*"));
        let ops = tracer.ops("refiltered").filter(one.clone()).disabled().register(count::<0>).expect("it is there");
        // Announced as on from here to the end: the threads call the function that every filter matches.
        let announced = Watched::new(ops, 0);
        announced.enable();
        let workers = Workers::start(THREADS, &[0], call_doubled);
        for _ in 0..ROUNDS {
            announced.refilter(all.clone());
            let before = seen(0);
            tripled(1);
            assert_eq!(seen(0), before + 1);
            workers.await_calls(10);
            announced.refilter(one.clone());
            tripled(1);
            assert_eq!(seen(0), before + 1);
            workers.await_calls(10);
        }
        workers.await_each();
        let tallies: Vec<Tally> = workers.finish().into_iter().map(|tallies| tallies[0]).collect();
        assert!(tallies.iter().all(|tally| tally.is_exact() && tally.due > 0 && tally.idle == 0), "{tallies:?}");
    });
}

#[test]
fn no_page_is_writable_and_executable_at_any_moment() {
    in_child("no_page_is_writable_and_executable_at_any_moment", || {
        for writer in [TextWriter::ProcMem, TextWriter::Remap] {
            let watch = maps::Watch::start();
            let tracer = Tracer::builder().text_writer(writer).build().expect("a tracer");
            let ops = watched::<0>(&tracer, "*");
            let workers = Workers::start(2, &[0], call_doubled);
            let looks = watch.looks();
            while watch.looks() < looks + 50 {
                ops.toggle(20, &workers);
            }
            workers.assert_exact(0);
            drop(ops);
            drop(tracer);
            assert_eq!(watch.finish(), [""; 0], "{writer}");
        }
    });
}

#[test]
fn the_watch_for_writable_code_finds_some() {
    in_child("the_watch_for_writable_code_finds_some", || {
        let watch = maps::Watch::start();
        let access = libc::PROT_READ | libc::PROT_WRITE | libc::PROT_EXEC;
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
        // SAFETY: asks for new memory, wherever there is room.
        let page = unsafe { libc::mmap(std::ptr::null_mut(), 4096, access, flags, -1, 0) };
        assert_ne!(page, libc::MAP_FAILED);
        watch.await_look();
        assert_eq!(watch.finish().len(), 1);
    });
}
