//! Reports of small streams, computed by hand.

mod common;

use std::fs;

use common::{Directory, begin, finish, trace};
use trapline_trace::{
    FunctionProfile, Profile, Stream, profile,
    record::{
        Event::{self, Enter, Exit, Point, Tail, Unwind},
        encode,
    },
};

const A: u32 = 100;
const B: u32 = 101;

fn profile_of(events: &[(u64, Event)], depth: u32, chunk: usize) -> Profile {
    let directory = Directory::new();
    let path = directory.file("p.data");
    fs::write(&path, trace(events, depth, chunk)).expect("a file");
    profile(&path).expect("a profile")
}

/// Calls, open, total, self, min, max.
fn numbers(profile: &Profile, site: u32) -> (u64, u64, u64, u64, u64, u64) {
    let found: Option<&FunctionProfile> = profile.functions.iter().find(|function| function.site == site);
    let found = found.expect("it was called");
    (found.calls, found.open, found.total_ticks, found.self_ticks, found.min_ticks, found.max_ticks)
}

#[test]
fn recursion_counts_the_outermost_time_once_and_chunks_do_not_matter() {
    let events = [
        (1000, Enter { site: A }),
        (1010, Enter { site: B }),
        (1020, Enter { site: A }),
        (1050, Exit { depth: 3 }),
        (1060, Exit { depth: 2 }),
        (1100, Exit { depth: 1 }),
    ];
    for chunk in [1, 2, 4, 100] {
        let profile = profile_of(&events, 0, chunk);
        assert_eq!(numbers(&profile, A), (2, 0, 100, 80, 30, 100));
        assert_eq!(numbers(&profile, B), (1, 0, 50, 20, 50, 50));
        assert_eq!(profile.functions[0].average_ticks(), Some(65));
        assert_eq!(profile.functions[0].percentile_ticks(500), Some(30));
        assert_eq!(profile.unmatched, 0);
    }
}

#[test]
fn unwinding_ends_deeper_frames_at_that_moment() {
    let events = [
        (0, Enter { site: A }),
        (10, Enter { site: B }),
        (20, Enter { site: 102 }),
        (50, Exit { depth: 1 }),
        (60, Enter { site: A }),
        (70, Enter { site: B }),
        (90, Unwind { depth: 1 }),
        (95, Exit { depth: 1 }),
    ];
    let profile = profile_of(&events, 0, 3);
    assert_eq!(numbers(&profile, A), (2, 0, 85, 25, 35, 50));
    assert_eq!(numbers(&profile, B), (2, 0, 60, 30, 20, 40));
    assert_eq!(numbers(&profile, 102), (1, 0, 30, 30, 30, 30));
}

#[test]
fn a_tail_call_takes_the_frame_over_and_is_a_point_without_one() {
    let events = [
        (0, Tail { site: B }),
        (5, Point { site: B }),
        (10, Enter { site: A }),
        (30, Tail { site: B }),
        (70, Exit { depth: 1 }),
    ];
    let profile = profile_of(&events, 0, 2);
    assert_eq!(numbers(&profile, A), (1, 0, 20, 20, 20, 20));
    assert_eq!(numbers(&profile, B), (3, 0, 40, 40, 40, 40));
}

#[test]
fn what_is_open_at_the_end_is_a_call_that_lasts_until_then() {
    let profile = profile_of(&[(0, Enter { site: A }), (10, Enter { site: B }), (40, Exit { depth: 2 })], 0, 9);
    assert_eq!(numbers(&profile, A), (1, 1, 40, 10, 40, 40));
    assert_eq!(numbers(&profile, B), (1, 0, 30, 30, 30, 30));
}

#[test]
fn returns_of_frames_from_before_a_fork_are_no_calls() {
    let events = [
        (0, Enter { site: B }),
        (9, Exit { depth: 3 }),
        (12, Exit { depth: 2 }),
        (15, Tail { site: A }),
        (20, Exit { depth: 1 }),
    ];
    let profile = profile_of(&events, 2, 9);
    assert_eq!((profile.functions.len(), profile.unmatched), (2, 0));
    assert_eq!(numbers(&profile, B), (1, 0, 9, 9, 9, 9));
    assert_eq!(numbers(&profile, A), (1, 0, 5, 5, 5, 5));
    // The control: without the parent's frames these returns match nothing.
    assert!(profile_of(&events, 0, 9).unmatched > 0);
}

#[test]
fn lost_records_leave_calls_without_durations_and_streams_apart() {
    let directory = Directory::new();
    let path = directory.file("p.data");
    let mut writer = begin(&path);
    writer.stream(&Stream { id: 2, process: 1, tid: 42, ..Stream::default() }).expect("a stream");
    let records =
        |events: &[(u64, Event)]| events.iter().map(|(tsc, event)| encode(*event, *tsc)).collect::<Vec<u64>>();
    writer.events(1, 0, 0, 0, &records(&[(0, Enter { site: A })])).expect("events");
    writer.events(2, 5, 0, 0, &records(&[(5, Enter { site: A })])).expect("events");
    writer
        .events(1, 50, 1, 7, &records(&[(50, Enter { site: B }), (60, Exit { depth: 2 }), (80, Exit { depth: 1 })]))
        .expect("events");
    writer.events(2, 90, 1, 0, &records(&[(95, Exit { depth: 1 })])).expect("events");
    finish(writer);
    let profile = profile(&path).expect("a profile");
    assert_eq!(numbers(&profile, A), (2, 1, 90, 90, 90, 90));
    assert_eq!(numbers(&profile, B), (1, 0, 10, 10, 10, 10));
    assert_eq!((profile.lost_before, profile.records), (7, 6));
}

/// A function whose entry is missing is one deeper than it seems, and so are those that it calls.
#[test]
fn a_return_that_is_deeper_than_any_open_frame_ends_the_innermost_that_may_be_so_deep() {
    // The entry at depth 1 is missing.
    let events = [
        (10, Enter { site: A }),
        (20, Enter { site: B }),
        (50, Exit { depth: 3 }),
        (80, Exit { depth: 2 }),
        (90, Exit { depth: 1 }),
        (100, Enter { site: A }),
        (130, Exit { depth: 1 }),
    ];
    for chunk in [1, 2, 100] {
        let profile = profile_of(&events, 0, chunk);
        assert_eq!(numbers(&profile, A), (2, 0, 100, 70, 30, 70), "chunks of {chunk}");
        assert_eq!(numbers(&profile, B), (1, 0, 30, 30, 30, 30), "chunks of {chunk}");
        assert_eq!(profile.unmatched, 1, "the return of what was not entered");
    }
}

#[test]
fn a_return_that_is_deeper_ends_no_frame_whose_depth_is_certain() {
    // When the first B returned, A was at depth 1 for certain. The entry of what returns at 60 is missing.
    let events = [
        (0, Enter { site: A }),
        (10, Enter { site: B }),
        (20, Exit { depth: 2 }),
        (60, Exit { depth: 2 }),
        (70, Enter { site: B }),
        (80, Exit { depth: 2 }),
        (100, Exit { depth: 1 }),
    ];
    for chunk in [1, 3, 100] {
        let profile = profile_of(&events, 0, chunk);
        assert_eq!(numbers(&profile, A), (1, 0, 100, 80, 100, 100), "chunks of {chunk}");
        assert_eq!(numbers(&profile, B), (2, 0, 20, 20, 10, 10), "chunks of {chunk}");
        assert_eq!(profile.unmatched, 1);
    }
    // Above A a tail call keeps what is certain, and an exception takes away from it.
    let events = [
        (0, Enter { site: A }),
        (10, Enter { site: 102 }),
        (20, Enter { site: 103 }),
        (30, Exit { depth: 3 }),
        (40, Tail { site: B }),
        (50, Exit { depth: 3 }),
        (60, Unwind { depth: 1 }),
        (70, Enter { site: B }),
        (75, Exit { depth: 3 }),
        (90, Exit { depth: 1 }),
    ];
    let profile = profile_of(&events, 0, 100);
    assert_eq!(numbers(&profile, A), (1, 0, 90, 35, 90, 90));
    assert_eq!(numbers(&profile, B), (2, 0, 25, 25, 5, 20));
    assert_eq!(profile.unmatched, 1, "what returned at 50 was not entered");
}

#[test]
fn a_torn_record_is_counted_and_what_it_was_the_entry_of_ends_nothing_else() {
    let directory = Directory::new();
    let path = directory.file("p.data");
    let mut writer = begin(&path);
    let torn = 0;
    let records = [
        encode(Enter { site: A }, 0),
        encode(Enter { site: B }, 10),
        encode(Exit { depth: 2 }, 20),
        torn,
        encode(Enter { site: B }, 40),
        encode(Exit { depth: 3 }, 45),
        encode(Exit { depth: 2 }, 60),
        encode(Exit { depth: 1 }, 100),
    ];
    writer.events(1, 0, 0, 0, &records).expect("events");
    finish(writer);
    let profile = profile(&path).expect("a profile");
    assert_eq!((profile.catalog.losses.torn, profile.records, profile.unmatched), (1, 7, 1));
    assert_eq!(numbers(&profile, A), (1, 0, 100, 85, 100, 100));
    assert_eq!(numbers(&profile, B), (2, 0, 15, 15, 5, 10));
}
