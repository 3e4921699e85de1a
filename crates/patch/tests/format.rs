//! The patch file: what is read is what was written, and everything else is refused.

mod common;

use common::{Directory, fixture};
use proptest::prelude::*;
use trapline_engine::{Addr, Mode};
use trapline_patch::{
    Callback, FormatError, Function, Linker, Note, NoteKind, Patch, Pin, Place, Relocation, Resolver, Role, Section,
    Symbol, Target, ThreadLocal, ThreadPlace, When,
};

/// A patch that has some of everything.
fn sample() -> Patch {
    let section = |name: &str, role, data: Vec<u8>, relocations| Section {
        name: name.to_owned(),
        object: "new.o".to_owned(),
        role,
        align: 16,
        len_bytes: data.len() as u64,
        data,
        relocations,
    };
    let place = |offset, kind, symbol, addend| Relocation { offset, kind, symbol, addend };
    let symbol = |name: &str, place| Symbol { name: name.to_owned(), place, len_bytes: 3 };
    Patch {
        name: "fix".to_owned(),
        target: Target { name: "server".to_owned(), mode: Mode::Bits64, build_id: vec![1, 2, 3] },
        functions: vec![Function {
            name: "serve".to_owned(),
            object: "server.c".to_owned(),
            address: 0x1130,
            expected: vec![0x90; 7],
            parts: vec![(0x1020, 12)],
            symbol: 0,
        }],
        pins: vec![Pin { name: "accept_loop".to_owned(), address: 0x1200, len_bytes: 40 }],
        callbacks: vec![Callback { when: When::PreApply, symbol: 0 }],
        sections: vec![
            section(
                ".text.serve",
                Role::Code,
                vec![0; 24],
                vec![place(0, 2, 1, -4), place(4, 4, 2, -4), place(8, 23, 3, 0), place(16, 1, 0, i64::MIN)],
            ),
            section(".rodata", Role::ReadOnly, b"tea\0".to_vec(), Vec::new()),
            Section { len_bytes: 4096, ..section(".bss", Role::Zero, Vec::new(), Vec::new()) },
        ],
        symbols: vec![
            symbol("serve", Place::Own { section: 0, offset: 0 }),
            symbol("stock", Place::Target { address: 0x4010 }),
            symbol(
                "puts",
                Place::Import { version: Some("GLIBC_2.2.5".to_owned()), is_weak: false, is_thread_local: false },
            ),
            symbol("visits", Place::TargetThreadLocal { offset: 4 }),
            symbol("_GLOBAL_OFFSET_TABLE_", Place::Table),
            symbol("one", Place::Absolute { value: u64::MAX }),
        ],
        notes: vec![Note {
            kind: NoteKind::Unchanged,
            symbol: "price".to_owned(),
            object: "new.o".to_owned(),
            detail: String::new(),
        }],
    }
}

struct Anywhere;

impl Resolver for Anywhere {
    fn bias(&self) -> u64 {
        0x5555_5555_4000
    }

    fn import(&self, _name: &str, _version: Option<&str>) -> Option<Addr> {
        Some(Addr::new(0x7f00_0000_1000))
    }

    fn thread_local(&self, _variable: ThreadLocal<'_>) -> Option<ThreadPlace> {
        Some(ThreadPlace { module: 1, offset: 8, from_thread_pointer: Some(-16) })
    }
}

#[test]
fn what_is_read_is_what_was_written() {
    let patch = sample();
    assert_eq!(Patch::decode(&patch.encode()), Ok(patch));
}

#[test]
fn every_damaged_byte_and_every_shorter_file_is_refused() {
    let file = sample().encode();
    for at in 0..file.len() {
        let mut damaged = file.clone();
        damaged[at] ^= 0x20;
        assert!(Patch::decode(&damaged).is_err(), "byte {at}");
        assert!(Patch::decode(&file[..at]).is_err(), "{at} bytes");
    }
    assert!(Patch::decode(&[&file[..], &[0]].concat()).is_err());
}

#[test]
fn newer_versions_and_other_files_are_told_apart() {
    let mut newer = sample().encode();
    newer[8] = 2;
    assert_eq!(Patch::decode(&newer), Err(FormatError::Version(2)));
    assert_eq!(Patch::decode(b"\x7fELF\x02\x01\x01 and so on, for a while"), Err(FormatError::NoPatch));
    assert_eq!(Patch::decode(&[]), Err(FormatError::NoPatch));
}

#[test]
fn contradictions_are_refused_although_the_checksums_are_right() {
    type Change = fn(&mut Patch);
    let wrong: [(&str, Change); 13] = [
        ("a symbol that is none", |patch| patch.sections[0].relocations[0].symbol = 6),
        ("a place outside", |patch| patch.sections[0].relocations[3].offset = 17),
        ("a place in zeroes", |patch| {
            patch.sections[2].relocations.push(Relocation { offset: 0, kind: 1, symbol: 0, addend: 0 });
        }),
        ("places over each other", |patch| patch.sections[0].relocations[1].offset = 3),
        ("an unknown type", |patch| patch.sections[0].relocations[0].kind = 200),
        ("thread-local and not", |patch| patch.sections[0].relocations[2].symbol = 1),
        ("a symbol outside", |patch| patch.symbols[0].place = Place::Own { section: 0, offset: 25 }),
        ("a body in a constant", |patch| patch.symbols[0].place = Place::Own { section: 1, offset: 0 }),
        ("an odd alignment", |patch| patch.sections[1].align = 12),
        ("too much", |patch| patch.sections[2].len_bytes = u64::MAX - 3),
        ("the same function twice", |patch| patch.functions.push(patch.functions[0].clone())),
        ("no build-id", |patch| patch.target.build_id.clear()),
        ("a function without an end", |patch| patch.functions[0].parts[0] = (u64::MAX, 2)),
    ];
    for (what, change) in wrong {
        let mut patch = sample();
        change(&mut patch);
        assert!(matches!(Patch::decode(&patch.encode()), Err(FormatError::Contradiction(_))), "{what}");
    }
}

proptest! {
    #[test]
    fn any_payload_is_refused_or_links(at in 0_usize..400, byte in any::<u8>(), cut in 0_usize..4) {
        let file = sample().encode();
        let mut payload = file[24..].to_vec();
        let at = at % payload.len();
        payload[at] = byte;
        payload.truncate(payload.len() - cut);
        if let Ok(patch) = Patch::decode(&Patch::with_checksums(&payload)) {
            prop_assert_eq!(Patch::decode(&patch.encode()), Ok(patch.clone()));
            let linker = Linker::new(&patch);
            if linker.len_bytes() < 1 << 24 {
                let _ = linker.link(Addr::new(0x5555_4000_0000), &Anywhere);
            }
        }
    }

    #[test]
    fn any_bytes_are_refused(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
        prop_assert!(Patch::decode(&bytes).is_err());
        let _ = Patch::decode(&Patch::with_checksums(&bytes));
    }
}

#[test]
fn damaged_objects_are_refused_or_read() {
    let directory = Directory::new();
    let object = directory.object("gcc", &fixture("shop.c"), "new.o", &["-O2", "-fPIC"]);
    let bytes = std::fs::read(&object).expect("it was just made");
    let target = directory.path("target.so");
    common::run("gcc", &["-shared", "-Wl,--build-id", common::text(&object), "-o", common::text(&target)]);
    // Every 37th byte, so that all tables are met.
    for at in (0..bytes.len()).step_by(37) {
        let mut damaged = bytes.clone();
        damaged[at] ^= 0xff;
        std::fs::write(&object, &damaged).expect("it is writable");
        let _ = common::build(&target, Some(&object), &object);
    }
}
