//! What is written is read again, and what is damaged is noticed.

mod common;

use std::fs;

use common::{Content, Directory, begin, finish, functions, read, trace};
use proptest::prelude::*;
use trapline_trace::{
    ClockPoint, End, Error, MAX_RECORDS, Meta, Module, Position, Writer,
    record::{Event, MAX_SITES, encode},
};

fn any_event() -> impl Strategy<Value = Event> {
    // Few sites most of the time, so that the dictionary is used.
    let site = prop_oneof![4 => 0..20_u32, 1 => 0..MAX_SITES];
    let depth = prop_oneof![4 => 0..20_u32, 1 => 0..1_u32 << 19];
    (0..5, site, depth).prop_map(|(kind, site, depth)| match kind {
        0 => Event::Enter { site },
        1 => Event::Exit { depth },
        2 => Event::Tail { site },
        3 => Event::Point { site },
        _ => Event::Unwind { depth },
    })
}

/// Times mostly rise a little, sometimes much, and sometimes fall.
fn any_events(most: usize) -> impl Strategy<Value = Vec<(u64, Event)>> {
    let step = prop_oneof![8 => 0..300_i64, 1 => -50..0_i64, 1 => 0..1_i64 << 38];
    prop::collection::vec((step, any_event()), 1..most).prop_map(|steps| {
        let mut tsc = 1_u64 << 45;
        let timed = |(step, event)| {
            tsc = tsc.wrapping_add_signed(step);
            (tsc, event)
        };
        steps.into_iter().map(timed).collect()
    })
}

fn events_of(content: &Content) -> Vec<(u64, Event)> {
    content.chunks.iter().flat_map(|(_, events)| events).map(|event| (event.tsc, event.event)).collect()
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 200, ..ProptestConfig::default() })]

    #[test]
    fn events_come_back_as_they_were(events in any_events(600), depth in 0..1_u32 << 19, chunk in 1..700_usize) {
        let content = read(&trace(&events, depth, chunk)).expect("a trace");
        prop_assert!(content.damage.is_none() && content.damage.is_finished);
        prop_assert_eq!(&events_of(&content), &events);
        let calls = events.iter().filter(|(_, event)| !matches!(event, Event::Exit { .. } | Event::Unwind { .. })).count();
        let expected = End { event_chunks: content.chunks.len() as u64, records: events.len() as u64, calls: calls as u64, record_ps: None };
        prop_assert_eq!(content.catalog.end, Some(expected));
    }

    #[test]
    fn a_changed_bit_is_noticed_and_the_other_chunks_are_read(events in any_events(200), at in any::<prop::sample::Index>(), bit in 0..8_u32) {
        let bytes = trace(&events, 0, 50);
        let mut changed = bytes.clone();
        changed[at.index(bytes.len())] ^= 1_u8 << bit;
        let content = read(&changed).expect("most of a trace");
        prop_assert_eq!(content.damage.places, 1);
        let whole = read(&bytes).expect("a trace");
        let lost = whole.chunks.len() - content.chunks.len();
        prop_assert!(lost <= 1, "{} chunks are lost", lost);
        prop_assert_eq!(content.damage.missing_chunks.max(content.damage.missing_records.min(1)), lost as u64);
        for (chunk, events) in &content.chunks {
            prop_assert!(whole.chunks.iter().any(|(known, same)| known.sequence == chunk.sequence && same == events));
        }
    }

    #[test]
    fn any_bytes_are_read_to_their_end(bytes in prop::collection::vec(any::<u8>(), 0..3000), from in 0..400_usize) {
        // Behind a good beginning, so that it is not refused at once.
        let mut trace = trace(&[(7, Event::Enter { site: 100 })], 0, 10);
        trace.truncate(trace.len().min(from.max(16)));
        trace.extend(bytes);
        let content = read(&trace).expect("the header is fine");
        prop_assert!(content.damage.skipped_bytes <= trace.len() as u64);
    }
}

fn some_events() -> Vec<(u64, Event)> {
    let event = |index: u64| match index % 4 {
        0 => Event::Enter { site: 100 + u32::try_from(index % 13).unwrap_or(0) },
        1 => Event::Point { site: 119 },
        2 => Event::Tail { site: 101 },
        _ => Event::Exit { depth: 1 },
    };
    (0..300).map(|index| (1000 + index * 30, event(index))).collect()
}

#[test]
fn a_trace_cut_at_any_byte_gives_all_chunks_before_the_cut() {
    let events = some_events();
    let bytes = trace(&events, 0, 64);
    let whole = read(&bytes).expect("a trace");
    let mut most = 0;
    for len in 0..bytes.len() {
        match read(&bytes[..len]) {
            Err(Error::Empty { .. }) => assert!(len < 16, "{len} bytes"),
            Err(error) => panic!("{len} bytes: {error}"),
            Ok(content) => {
                assert!(!content.damage.is_finished, "{len} bytes of {} look finished", bytes.len());
                let found = events_of(&content);
                assert_eq!(found, events[..found.len()], "{len} bytes");
                assert!(found.len() >= most, "{len} bytes give less than fewer bytes did");
                most = found.len();
            }
        }
    }
    assert_eq!((most, whole.damage.is_finished), (events.len(), true));
}

#[test]
fn each_flipped_bit_of_a_small_trace_is_noticed() {
    let bytes = trace(&some_events()[..8], 0, 4);
    let whole = read(&bytes).expect("a trace");
    assert!(whole.damage.is_none(), "the control: without a change there is no damage");
    for bit in 0..bytes.len() * 8 {
        let mut changed = bytes.clone();
        changed[bit / 8] ^= 1 << (bit % 8);
        let content = read(&changed).expect("most of a trace");
        assert!(!content.damage.is_none(), "bit {bit} went unnoticed");
        assert!(content.damage.skipped_bytes > 0);
    }
}

#[test]
fn bytes_that_are_inserted_or_missing_cost_one_chunk() {
    let events = some_events();
    let bytes = trace(&events, 0, 50);
    let middle = bytes.len() * 2 / 3;
    let inserted = [&bytes[..middle], b"\xf1TL\x8e rubbish \xf1TL", &bytes[middle..]].concat();
    let missing = [&bytes[..middle], &bytes[middle + 7..]].concat();
    for changed in [inserted, missing] {
        let content = read(&changed).expect("most of a trace");
        assert_eq!((content.damage.places, content.damage.missing_chunks), (1, 1));
        assert_eq!(content.chunks.len(), 5);
        assert_eq!(content.damage.missing_records, 50);
        assert!(content.chunks.iter().filter(|(chunk, _)| chunk.follows_gap).count() == 1);
    }
}

#[test]
fn a_missing_last_chunk_is_known_from_the_end() {
    let bytes = trace(&some_events(), 0, 50);
    let whole = read(&bytes).expect("a trace");
    let last = whole.chunks.last().expect("chunks").0.len_bytes;
    // The last chunk of events lies before the four that end the trace.
    let marker = bytes.windows(4).enumerate().filter(|(_, window)| *window == [0xf1, b'T', b'L', 0x8e]);
    let starts: Vec<usize> = marker.map(|(at, _)| at).collect();
    let start = starts[starts.len() - 5];
    let without = [&bytes[..start], &bytes[start + last..]].concat();
    let content = read(&without).expect("most of a trace");
    assert_eq!((content.damage.places, content.damage.missing_records), (0, 50));
}

#[test]
fn what_is_no_event_comes_back() {
    let content = read(&trace(&some_events(), 0, 64)).expect("a trace");
    let catalog = &content.catalog;
    assert_eq!(catalog.meta.as_ref().map(|meta| meta.command.join(" ")), Some("prog".into()));
    assert_eq!(catalog.processes[&1].pid, 41);
    assert_eq!(catalog.streams[&1].name, "prog");
    assert_eq!(catalog.modules[&5].build_id.as_deref(), Some("ab01"));
    assert_eq!(catalog.exits[&1].status, Some(0));
    assert_eq!(catalog.loads[0].bias, 0x5555_0000_0000);
    let function = catalog.function(106);
    assert_eq!((function.name(), function.module_path()), ("f6".into(), "/bin/prog"));
    assert_eq!(function.function.and_then(|function| function.untraced.as_deref()), Some("too-short"));
    assert_eq!(catalog.function(107).function.and_then(|function| function.untraced.as_deref()), None);
    assert_eq!(catalog.function(120).name(), "site 120");
    assert_eq!(catalog.functions().count(), 20);
    assert_eq!(catalog.clock().ns(500), 500);
    assert_eq!(catalog.clock().since_start_ns(70), 70);
}

#[test]
fn many_functions_with_long_names_come_back() {
    let directory = Directory::new();
    let path = directory.file("t.data");
    let mut functions = functions(10_000);
    functions[3].name = "n".repeat(1 << 20);
    functions[9_999].address = 0x20;
    functions[9_998].name = "häßlich::<é>".repeat(100);
    let mut writer = begin(&path);
    let module = Module { id: 6, path: "/lib/many.so", build_id: None, first_site: 1000, functions: &functions };
    writer.module(&module).expect("a module");
    finish(writer);
    let content = read(&fs::read(&path).expect("the trace")).expect("a trace");
    for (index, function) in functions.iter().enumerate() {
        let found = content.catalog.function(1000 + u32::try_from(index).expect("few")).function.expect("a function");
        if index == 3 {
            assert!(function.name.starts_with(&found.name) && found.name.len() == 64 << 10);
        } else {
            assert_eq!(found, function);
        }
    }
}

#[test]
fn the_clock_is_calibrated_by_points_far_apart() {
    let directory = Directory::new();
    let path = directory.file("t.data");
    let mut writer = begin(&path);
    writer.calibration(&[ClockPoint { tsc: 400, monotonic_ns: 1100 }]).expect("a clock");
    writer.calibration(&[ClockPoint { tsc: 4000, monotonic_ns: 2000 }]).expect("a clock");
    writer.finish().expect("the end");
    let content = read(&fs::read(&path).expect("the trace")).expect("a trace");
    assert_eq!((content.catalog.clock().ns(400), content.catalog.clock().is_known), (100, true));
}

#[test]
fn words_that_are_no_records_are_counted_and_left_out() {
    let directory = Directory::new();
    let path = directory.file("t.data");
    let mut writer = begin(&path);
    let enter = encode(Event::Enter { site: 100 }, 50);
    let end =
        writer.events(1, 50, 0, 0, &[0, enter, 0, u64::MAX, encode(Event::Exit { depth: 1 }, 60)]).expect("events");
    assert_eq!(end, Position { tsc: 60, depth: 0 });
    let end = writer.events(1, end.tsc, end.depth, 5, &[0, 0]).expect("nothing");
    assert_eq!(end, Position { tsc: 60, depth: 0 });
    writer.events(1, end.tsc, end.depth, 4, &[]).expect("nothing at all");
    writer.events(1, 60, 0, 2, &[enter]).expect("events");
    finish(writer);
    let content = read(&fs::read(&path).expect("the trace")).expect("a trace");
    assert_eq!(content.catalog.losses.torn, 5);
    let lost: Vec<u64> = content.chunks.iter().map(|(chunk, _)| chunk.lost_before).collect();
    assert_eq!(lost, [0, 11], "what was lost before an empty batch is not forgotten");
    assert_eq!(content.catalog.end.map(|end| end.records), Some(3));
}

#[test]
fn a_batch_of_any_length_is_written() {
    let directory = Directory::new();
    let path = directory.file("t.data");
    let mut writer = begin(&path);
    let most = u32::try_from(MAX_RECORDS).expect("a small number");
    let records: Vec<u64> = (0..=2 * most)
        .map(|index| encode(Event::Point { site: index.wrapping_mul(7919) % MAX_SITES }, index.into()))
        .collect();
    writer.events(1, 0, 0, 0, &records).expect("events");
    finish(writer);
    let content = read(&fs::read(&path).expect("the trace")).expect("a trace");
    let found: Vec<u64> = events_of(&content).iter().map(|(tsc, event)| encode(*event, *tsc)).collect();
    assert!(found == records, "all of them, in order");
    assert_eq!(content.chunks.len(), 3);
}

#[test]
fn times_go_on_where_40_bits_wrap() {
    let start = (9 << 40) - 20;
    let events: Vec<(u64, Event)> = (0..10).map(|index| (start + index * 5, Event::Point { site: 100 })).collect();
    assert_eq!(events_of(&read(&trace(&events, 0, 3)).expect("a trace")), events);
}

#[test]
fn an_older_trace_is_kept_once() {
    let directory = Directory::new();
    let path = directory.file("t.data");
    for text in ["first", "second"] {
        fs::write(&path, text).expect("a file");
        Writer::create(&path, &Meta::default()).expect("a trace").finish().expect("the end");
        assert_eq!(fs::read_to_string(directory.file("t.data.old")).expect("kept"), text);
    }
}

#[test]
fn a_trace_belongs_to_its_owner() {
    use std::os::unix::fs::PermissionsExt;
    let directory = Directory::new();
    let path = directory.file("t.data");
    let _writer = Writer::create(&path, &Meta::default()).expect("a trace");
    assert_eq!(fs::metadata(&path).expect("a file").permissions().mode() & 0o077, 0);
}

#[test]
fn what_is_no_trace_is_refused_with_the_next_step() {
    let directory = Directory::new();
    let error = |bytes: &[u8]| read(bytes).expect_err("no trace").to_string();
    assert!(error(b"").contains("is empty") && error(b"\x8ftrap").contains("record again"));
    let text = error(b"#!/bin/sh\necho this is no trace at all\n");
    assert!(text.contains("not a trapline trace") && text.contains("#!/bin/sh") && text.contains("-i"), "{text}");
    let mut newer = trace(&some_events(), 0, 64);
    newer[8] = 9;
    assert!(read(&newer).is_ok_and(|content| content.damage.places == 1), "a damaged version is no newer version");
    let sum = crc32fast::hash(&newer[..12]);
    newer[12..16].copy_from_slice(&sum.to_le_bytes());
    let text = error(&newer);
    assert!(text.contains("version 9") && text.contains("up to 1"), "{text}");
    let missing = trapline_trace::Reader::open(&directory.file("none.data")).expect_err("no file").to_string();
    assert!(missing.contains("trapline record"), "{missing}");
    let created =
        Writer::create(&directory.file("none/t.data"), &Meta::default()).expect_err("no directory").to_string();
    assert!(created.contains("-o"), "{created}");
}

#[test]
fn a_full_disk_is_told_and_does_no_harm() {
    let path = std::path::Path::new("/dev/full");
    let error = Writer::create(path, &Meta::default()).expect_err("no room").to_string();
    assert!(error.contains("/dev/full") && error.contains("free some room"), "{error}");
    assert!(path.exists(), "a device is not renamed");
}

#[test]
fn chunks_of_unknown_types_are_skipped() {
    let mut bytes = trace(&some_events(), 0, 64);
    let payload = b"from the future";
    bytes.extend(trapline_trace::format::frame(77, payload));
    bytes.extend(payload);
    let content = read(&bytes).expect("a trace");
    assert!(content.damage.is_none());
}
