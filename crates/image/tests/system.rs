//! What the machine's own programs look like: nobody compiled them for us.
//!
//! Programs that are not installed are left out, and the test says so; at least some have to be there.

use std::path::Path;

use trapline_engine::{Addr, AddrRange};
use trapline_image::{ArmRequest, Armed, Entries, Image, Rung, Verdict};

const PROGRAMS: [&str; 8] = [
    "/usr/bin/ls",
    "/usr/bin/xz",
    "/usr/bin/gzip",
    "/usr/bin/bash",
    "/usr/bin/perl",
    "/usr/bin/python3.11",
    "/usr/bin/openssl",
    "/usr/bin/git",
];

const LIBRARIES: [&str; 3] = [
    "/lib/x86_64-linux-gnu/libc.so.6",
    "/lib/x86_64-linux-gnu/libcrypto.so.3",
    "/usr/lib/x86_64-linux-gnu/libstdc++.so.6",
];

fn images(paths: &[&str]) -> Vec<(String, Image)> {
    let mut images = Vec::new();
    for path in paths {
        if Path::new(path).exists() {
            images.push(((*path).to_owned(), Image::open(Path::new(path)).expect("it runs, so it can be read")));
        } else {
            eprintln!("left out: {path} is not installed");
        }
    }
    assert!(!images.is_empty(), "nothing was tested");
    images
}

/// Everything that can be armed, where Linux would load it.
fn arm_all(image: &Image, entries: Addr) -> (Vec<usize>, Armed, u64) {
    let functions = image.functions().iter().enumerate();
    let selected: Vec<usize> =
        functions.filter(|(_, function)| function.plan().is_some()).map(|(index, _)| index).collect();
    let bias = if image.lowest_address() == 0 { 0x5555_5555_4000 } else { 0 };
    let end = (image.text_range().end.value() + bias).next_multiple_of(1 << 24) + (1 << 24);
    let armed = image.arm(&ArmRequest {
        selected: &selected,
        bias,
        stubs_at: Addr::new(end),
        entries: Entries::all_at(entries),
        first_site: 1000,
        returns: true,
        limit_depth: false,
        shims: &[],
        diverted: &[],
    });
    (selected, armed, bias)
}

#[test]
fn nearly_every_function_of_every_program_can_be_traced() {
    for (path, image) in images(&PROGRAMS).into_iter().chain(images(&LIBRARIES)) {
        let total = image.functions().len();
        let untraced: Vec<_> = image.functions().iter().filter_map(trapline_image::Function::untraced).collect();
        let traced = total - untraced.len();
        assert!(traced * 100 >= total * 99, "{path}: {traced} of {total}");
        assert!(untraced.iter().all(|(reason, _)| !reason.is_empty()));
    }
}

#[test]
fn functions_are_ordered_and_lie_in_the_code() {
    for (path, image) in images(&PROGRAMS).into_iter().chain(images(&LIBRARIES)) {
        let text = image.text_range();
        for pair in image.functions().windows(2) {
            assert!(pair[0].address < pair[1].address, "{path}: {:#x}", pair[1].address);
        }
        for function in image.functions() {
            assert!(text.contains(Addr::new(function.address)), "{path}: {}", function.name);
            assert!(!function.name.is_empty());
            assert!(Addr::new(function.end()) <= text.end, "{path}: {}", function.name);
        }
    }
}

#[test]
fn writes_stay_apart_and_expect_what_is_in_the_file() {
    for (path, image) in images(&PROGRAMS).into_iter().chain(images(&LIBRARIES)) {
        for entries in [Addr::new(0x7f00_0000_0000), Addr::new(0x10_0000)] {
            let (selected, armed, bias) = arm_all(&image, entries);
            assert!(armed.refused.is_empty(), "{path}: {:?}", armed.refused);
            assert_eq!(armed.sites.len(), selected.len());
            assert!(armed.stubs.len() <= image.stub_bytes_bound(&selected, &[]));
            let mut end = Addr::default();
            for write in &armed.writes {
                assert!(end <= write.at, "{path}: {} is written twice", write.at);
                end = write.at.after(write.new.len());
                let in_file = image.code(write.at.offset(-bias.cast_signed()));
                assert!(in_file.starts_with(&write.expected), "{path}: {}", write.at);
            }
        }
    }
}

#[test]
fn no_function_begins_in_what_is_written_for_another() {
    for (path, image) in images(&PROGRAMS).into_iter().chain(images(&LIBRARIES)) {
        let entries: Vec<u64> = image.functions().iter().map(|function| function.address).collect();
        let labels: Vec<u64> = image.left_out().iter().map(|other| other.address().value()).collect();
        let (_, armed, bias) = arm_all(&image, Addr::new(0x7f00_0000_0000));
        let mut sites = armed.sites.iter().map(|site| site.address.value() - bias).collect::<Vec<_>>();
        sites.sort_unstable();
        for write in &armed.writes {
            let range = AddrRange::new(write.at.offset(-bias.cast_signed()), write.new.len() as u64);
            for all in [&entries, &labels] {
                let first = all.partition_point(|entry| *entry <= range.start.value());
                let inside = all.get(first).is_some_and(|entry| *entry < range.end.value());
                assert!(!inside, "{path}: {range:x?}");
            }
        }
    }
}

#[test]
fn short_jumps_reach_their_padding() {
    let mut count = 0;
    for (path, image) in images(&PROGRAMS).into_iter().chain(images(&LIBRARIES)) {
        let (_, armed, bias) = arm_all(&image, Addr::new(0x7f00_0000_0000));
        for site in &armed.sites {
            let Verdict::Traced(plan) = &image.functions()[site.function].verdict else { continue };
            let Rung::ShortJump { pad } = plan.rung else { continue };
            let find = |at: u64| armed.writes.iter().find(|write| write.at.value() == at + bias).map(|write| write.new);
            let short = find(plan.window_at).expect("the short jump");
            let long = find(pad).expect("the jump in the padding");
            let distance = i64::from(short[1].cast_signed());
            assert_eq!(plan.window_at.wrapping_add_signed(2 + distance), pad, "{path}");
            let displacement = i32::from_le_bytes(long[1..5].try_into().expect("four bytes"));
            assert_eq!(site.jump_at.after(5).offset(displacement.into()), site.on, "{path}");
            count += 1;
        }
    }
    println!("{count} short jumps");
}
