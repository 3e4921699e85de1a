//! The events of several threads in the order of time, beside the order of their chunks.

mod common;

use std::{fs, path::Path};

use common::{Directory, begin, finish, read};
use trapline_trace::{
    Order, Stream, TimedEvent, Timeline,
    record::{
        Event::{self, Enter, Exit},
        encode,
    },
};

const A: u32 = 100;

/// Streams 1 to `streams`, of which stream `i` has an event at each time that leaves the remainder `i` when it is divided by 10; each stream's events in a
/// row, in chunks of 3.
fn write(path: &Path, streams: u32, events: u64) {
    let mut writer = begin(path);
    for id in 1..=streams {
        if id > 1 {
            writer.stream(&Stream { id, process: 1, tid: 40 + id, ..Stream::default() }).expect("a stream");
        }
        let event = |index: u64| if index.is_multiple_of(2) { Enter { site: A } } else { Exit { depth: 1 } };
        let all: Vec<u64> = (0..events).map(|index| encode(event(index), index * 10 + u64::from(id))).collect();
        let (mut tsc, mut depth) = (u64::from(id), 0);
        for records in all.chunks(3) {
            let end = writer.events(id, tsc, depth, 0, records).expect("events");
            (tsc, depth) = (end.tsc, end.depth);
        }
    }
    finish(writer);
}

/// All events with their streams.
fn all(timeline: &mut Timeline) -> Vec<(u32, TimedEvent)> {
    let (mut events, mut ended) = (Vec::new(), Vec::new());
    while let Some(part) = timeline.next_part().expect("a file") {
        assert!(!ended.contains(&part.stream), "a stream has events after its last ones");
        events.extend(part.events.iter().map(|event| (part.stream, *event)));
        ended.extend(part.is_last.then_some(part.stream));
    }
    events
}

fn is_sorted(events: &[(u32, TimedEvent)]) -> bool {
    events.is_sorted_by_key(|(_, event)| event.tsc)
}

#[test]
fn streams_are_merged_by_time_and_nothing_is_missing() {
    let directory = Directory::new();
    let path = directory.file("t.data");
    write(&path, 7, 20);
    let (mut timeline, _, damage) = Timeline::open(&path, Order::Time, |_, _| true).expect("a trace");
    let merged = all(&mut timeline);
    assert!(damage.is_none() && timeline.senseless_chunks() == 0);
    assert_eq!(merged.len(), 7 * 20);
    assert!(is_sorted(&merged));
    // Each stream's events are its own, in their order. And the control: in the file, they are in another order than that of time.
    let content = read(&fs::read(&path).expect("the trace")).expect("a trace");
    let in_file: Vec<(u32, TimedEvent)> =
        content.chunks.iter().flat_map(|(chunk, events)| events.iter().map(|event| (chunk.stream, *event))).collect();
    assert!(!is_sorted(&in_file));
    let of = |events: &[(u32, TimedEvent)], id: u32| -> Vec<TimedEvent> {
        events.iter().filter(|(stream, _)| *stream == id).map(|(_, event)| *event).collect()
    };
    for id in 1..=7 {
        assert_eq!(of(&merged, id), of(&in_file, id));
    }
}

#[test]
fn only_streams_that_are_wanted_are_given() {
    let directory = Directory::new();
    let path = directory.file("t.data");
    write(&path, 3, 8);
    let is_wanted = |catalog: &trapline_trace::Catalog, stream| catalog.streams[&stream].tid == 42;
    let (mut timeline, ..) = Timeline::open(&path, Order::Time, is_wanted).expect("a trace");
    let events = all(&mut timeline);
    assert_eq!(events.len(), 8);
    assert!(events.iter().all(|(stream, _)| *stream == 2));
}

#[test]
fn a_chunk_of_a_damaged_file_is_a_gap_and_the_others_are_in_order() {
    let directory = Directory::new();
    let path = directory.file("t.data");
    write(&path, 2, 12);
    let mut bytes = fs::read(&path).expect("the trace");
    // In the second of stream 1's chunks.
    let markers: Vec<usize> =
        (0..bytes.len() - 8).filter(|at| bytes[*at..*at + 8] == [0xf1, b'T', b'L', 0x8e, 8, 0, 0, 0]).collect();
    bytes[markers[1] + 40] ^= 1;
    fs::write(&path, bytes).expect("a file");
    let (mut timeline, _, damage) = Timeline::open(&path, Order::Time, |_, _| true).expect("a trace");
    assert_eq!((damage.missing_chunks, damage.missing_records), (1, 3));
    let mut gaps = Vec::new();
    let mut times: Vec<u64> = Vec::new();
    while let Some(part) = timeline.next_part().expect("a file") {
        gaps.extend(part.starts.filter(|chunk| chunk.follows_gap).map(|chunk| (chunk.stream, chunk.sequence)));
        times.extend(part.events.iter().map(|event| event.tsc));
    }
    assert_eq!(gaps, [(1, 2)]);
    assert!(times.is_sorted() && times.len() == 24 - 3);
}

#[test]
fn times_that_go_back_stay_in_the_order_of_their_stream() {
    let directory = Directory::new();
    let path = directory.file("t.data");
    let mut writer = begin(&path);
    writer.stream(&Stream { id: 2, process: 1, tid: 42, ..Stream::default() }).expect("a stream");
    let records = |events: &[(u64, Event)]| events.iter().map(|(tsc, event)| encode(*event, *tsc)).collect::<Vec<_>>();
    let enter = Enter { site: A };
    writer.events(1, 10, 0, 0, &records(&[(10, enter), (50, enter), (30, enter), (60, enter)])).expect("events");
    writer.events(2, 20, 0, 0, &records(&[(20, enter), (40, enter), (55, enter)])).expect("events");
    finish(writer);
    let (mut timeline, ..) = Timeline::open(&path, Order::Time, |_, _| true).expect("a trace");
    let times: Vec<u64> = all(&mut timeline).iter().map(|(_, event)| event.tsc).collect();
    assert_eq!(times, [10, 20, 40, 50, 30, 55, 60]);
}

#[test]
fn one_thread_comes_after_the_other_if_that_is_asked_for() {
    let directory = Directory::new();
    let path = directory.file("t.data");
    write(&path, 3, 20);
    let (mut timeline, ..) = Timeline::open(&path, Order::Stream, |_, stream| stream != 2).expect("a trace");
    assert_eq!(timeline.records(), 2 * 20);
    let events = all(&mut timeline);
    assert!(events.is_sorted_by_key(|(stream, event)| (*stream, event.tsc)) && !is_sorted(&events));
    assert_eq!(events.len(), 2 * 20);
}
