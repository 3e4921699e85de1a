//! Files that are broken are no reason to panic, or to take forever.

mod common;

use std::fs;

use common::{Directory, fixture, run, text};
use trapline_engine::Addr;
use trapline_image::{ArmRequest, Entries, Image};

/// A small xorshift generator: the same mutations each time.
struct Random(u64);

impl Random {
    fn below(&mut self, end: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        usize::try_from(self.0 % end as u64).expect("it is below a usize")
    }
}

fn shared_object() -> Vec<u8> {
    let directory = Directory::new();
    let path = directory.path("shapes.so");
    let source = directory.path("source.cc");
    let code = "struct S { ~S(); }; int f(int); void g(); int h(int x) { S s; switch (f(x)) { case 1: return 7; case 2: g(); break; case 3: return f(2); \
                case 4: return 3 * f(x); case 5: return 9; } try { g(); } catch (int y) { return y; } return f(x + 1); }";
    fs::write(&source, code).expect("the directory is writable");
    run("g++", &["-O2", "-fPIC", "-shared", text(&source), "-o", text(&path)]);
    fs::read(path).expect("it was just linked")
}

fn program() -> Vec<u8> {
    let directory = Directory::new();
    let path = directory.path("shapes");
    run("gcc", &["-O1", "-no-pie", "-fno-pie", &fixture("harness.c"), &fixture("shapes.S"), "-o", text(&path)]);
    fs::read(path).expect("it was just linked")
}

/// Reads a file and arms all that can be armed. Returns how many functions there are.
fn exercise(bytes: Vec<u8>) -> usize {
    let Ok(image) = Image::parse(bytes, "broken") else { return 0 };
    let selected: Vec<usize> = (0..image.functions().len()).collect();
    let entry = Addr::new(0x7f00_0000_0000);
    let armed = image.arm(&ArmRequest {
        selected: &selected,
        bias: 0x5555_5555_4000,
        stubs_at: Addr::new(0x5555_6000_0000),
        entries: Entries::all_at(entry),
        first_site: 0,
        returns: true,
        limit_depth: true,
        shims: &[],
        diverted: &[],
    });
    assert_eq!(armed.sites.len() + armed.refused.len(), selected.len());
    for pair in armed.writes.windows(2) {
        assert!(pair[0].at.after(pair[0].new.len()) <= pair[1].at, "{} {}", pair[0].at, pair[1].at);
    }
    selected.len()
}

#[test]
fn mutated_files_are_read_or_refused() {
    for original in [program(), shared_object()] {
        assert!(exercise(original.clone()) > 3, "or else this test shows nothing");
        let mut random = Random(0x9e37_79b9_7f4a_7c15);
        for round in 0..300 {
            let mut bytes = original.clone();
            for _ in 0..=random.below(12) {
                // Half of them in the headers.
                let end = if round % 2 == 0 { 0x400 } else { bytes.len() };
                let at = random.below(end);
                bytes[at] = match random.below(4) {
                    0 => 0,
                    1 => 0xff,
                    2 => bytes[at] ^ 1 << random.below(8),
                    _ => u8::try_from(random.below(256)).expect("a byte"),
                };
            }
            exercise(bytes);
        }
    }
}

#[test]
fn files_that_are_cut_short_are_read_or_refused() {
    let original = program();
    for len in (0..original.len()).step_by(original.len() / 97) {
        exercise(original[..len].to_vec());
    }
}

#[test]
fn what_is_no_elf_file_is_refused_with_a_reason() {
    for (bytes, reason) in [
        (&b"#!/bin/sh\n"[..], "begin as an ELF file"),
        (b"", "begin as an ELF file"),
        (b"\x7fELF\x02\x02", "another architecture"),
        (b"\x7fELF\x02\x01", ""),
    ] {
        let error = Image::parse(bytes.to_vec(), "x").expect_err("there is nothing to read");
        assert!(error.to_string().contains(reason), "{error}");
    }
}
