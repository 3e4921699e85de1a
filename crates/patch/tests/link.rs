//! Patches that are built from what compilers make, fitted to a running process, and run there.

mod common;

use std::path::PathBuf;

use common::{Directory, Host, build, fixture};
use trapline_engine::Addr;
use trapline_patch::{Error, LinkError, Linker, NoteKind, Patch, Protection, Reason};

const BEFORE: &str = "\
4001 106002 stock 38 sold 2 visits 102 probe 7
winter tea summer coffee No such file or directory between
1 10.50 1.75 123
";

const AFTER: &str = "\
-989 100013 stock 36 sold 4 visits 104 probe 9
winter tea high summer coffee No such file or directory between
1 17.50 new 2.25 321
";

/// What is left as it was.
const AFTER_WITHOUT_PATCH: &str = "\
2003 104004 stock 36 sold 4 visits 104 probe 9
winter tea summer coffee No such file or directory between
1 10.50 1.75 123
";

struct Shop {
    directory: Directory,
    target: PathBuf,
    old: PathBuf,
    new: PathBuf,
}

/// Compiles the shop, the recompiled shop, and a program with the old one.
fn shop(tool: &str, flags: &[&str]) -> Shop {
    let directory = Directory::new();
    let old = directory.object(tool, &fixture("shop.c"), "old.o", flags);
    let new = directory.object(tool, &fixture("shop.c"), "new.o", &[flags, &["-DNEW"]].concat());
    let target = directory.path("shop");
    let host = fixture("host.c");
    let link = ["-w", common::text(&host), common::text(&old), "-o", common::text(&target)];
    let libraries = ["-Wl,--build-id", "-Wl,--no-as-needed", "-lm", "-ldl", "-rdynamic"];
    common::run(tool, &[&link[..], flags, &libraries].concat());
    Shop { directory, target, old, new }
}

fn built(shop: &Shop) -> Patch {
    build(&shop.target, Some(&shop.old), &shop.new).unwrap_or_else(|error| panic!("{error}"))
}

fn names(patch: &Patch) -> Vec<&str> {
    let mut names: Vec<_> = patch.functions.iter().map(|function| function.name.as_str()).collect();
    names.sort_unstable();
    names
}

fn a_patched_program_goes_on_with_its_variables(tool: &str, flags: &[&str]) {
    let shop = shop(tool, flags);
    let patch = built(&shop);
    assert_eq!(Patch::decode(&patch.encode()).as_ref(), Ok(&patch), "{tool} {flags:?}");
    let host = Host::start(&shop.target);
    assert_eq!(host.scenario(), BEFORE, "{tool} {flags:?}");
    let linked = host.apply(&patch);
    assert_eq!(host.scenario(), AFTER, "{tool} {flags:?}");
    for segment in &linked.segments {
        assert_eq!(segment.at.value() % 4096, 0);
        assert_eq!(segment.bytes.len() % 4096, 0);
    }
    let overlap = linked.segments.windows(2).any(|pair| pair[0].at.after(pair[0].bytes.len()) > pair[1].at);
    assert!(!overlap, "parts of different protection share no page");
    assert!(host.end().success());
}

#[test]
fn patches_of_64_bit_objects_run() {
    for tool in ["gcc", "clang"] {
        for flags in [
            &["-O0"][..],
            &["-O2"],
            &["-O2", "-no-pie", "-fno-pie"],
            &["-O2", "-fPIC"],
            &["-O2", "-fPIC", "-ftls-model=global-dynamic"],
            &["-O2", "-fPIC", "-ftls-model=local-dynamic"],
            &["-O2", "-fPIC", "-ftls-model=initial-exec"],
        ] {
            a_patched_program_goes_on_with_its_variables(tool, flags);
        }
    }
    a_patched_program_goes_on_with_its_variables("gcc", &["-O2", "-fno-plt", "-fPIC", "-fcf-protection=full"]);
    a_patched_program_goes_on_with_its_variables("gcc", &["-O2", "-mcmodel=medium"]);
}

#[test]
fn patches_of_32_bit_objects_run() {
    for tool in ["gcc", "clang"] {
        for flags in [
            &["-m32", "-O0"][..],
            &["-m32", "-O2"],
            &["-m32", "-O2", "-no-pie", "-fno-pie"],
            &["-m32", "-O2", "-fPIC"],
            &["-m32", "-O2", "-fPIC", "-ftls-model=local-dynamic"],
            &["-m32", "-O2", "-fPIC", "-ftls-model=initial-exec"],
            &["-m32", "-O2", "-fno-pie", "-no-pie", "-ftls-model=initial-exec"],
        ] {
            a_patched_program_goes_on_with_its_variables(tool, flags);
        }
    }
}

#[test]
fn an_object_alone_replaces_all_functions_that_the_target_has() {
    let shop = shop("gcc", &["-O2"]);
    let patch = build(&shop.target, None, &shop.new).unwrap_or_else(|error| panic!("{error}"));
    assert!(names(&patch).contains(&"scenario"));
    let host = Host::start(&shop.target);
    assert_eq!(host.scenario(), BEFORE);
    host.apply(&patch);
    assert_eq!(host.scenario(), AFTER);
    assert!(host.end().success());
}

#[test]
fn only_what_changed_is_in_a_patch_and_the_rest_is_named() {
    let shop = shop("gcc", &["-O2"]);
    let patch = built(&shop);
    assert_eq!(names(&patch), ["compare", "discount", "season", "sell", "share", "sorted"]);
    let noted = |kind: NoteKind| -> Vec<&str> {
        patch.notes.iter().filter(|note| note.kind == kind).map(|note| note.symbol.as_str()).collect()
    };
    assert_eq!(noted(NoteKind::Unchanged), ["price", "scenario"]);
    assert_eq!(noted(NoteKind::New), ["refund"]);
    assert_eq!(noted(NoteKind::NewData), ["ledger", "refunds"]);
    assert_eq!(noted(NoteKind::OtherBuild), [""; 0]);
    let bytes = std::fs::read(&shop.target).expect("it was just made");
    for function in &patch.functions {
        let found = bytes.windows(function.expected.len()).any(|window| window == function.expected);
        assert!(found, "{} is expected as the file has it", function.name);
    }
}

#[test]
fn the_target_of_another_build_is_noticed() {
    let shop = shop("gcc", &["-O2"]);
    let flags = ["-O1"];
    let old = shop.directory.object("gcc", &fixture("shop.c"), "old-1.o", &flags);
    let new = shop.directory.object("gcc", &fixture("shop.c"), "new-1.o", &["-O1", "-DNEW"]);
    let patch = build(&shop.target, Some(&old), &new).unwrap_or_else(|error| panic!("{error}"));
    let other = patch.notes.iter().filter(|note| note.kind == NoteKind::OtherBuild);
    assert!(other.clone().any(|note| note.symbol == "sell"), "{:?}", other.collect::<Vec<_>>());
}

#[test]
fn without_diversion_the_old_functions_run() {
    let shop = shop("gcc", &["-O2"]);
    let patch = built(&shop);
    let host = Host::start(&shop.target);
    assert_eq!(host.scenario(), BEFORE);
    let linker = Linker::new(&patch);
    let fitted = linker.link(host.reserve(linker.len_bytes(), false), &host).expect("it fits");
    host.map(&fitted);
    assert_eq!(host.scenario(), AFTER_WITHOUT_PATCH);
    assert!(host.end().success());
}

#[test]
fn what_cannot_be_resolved_or_reached_is_named() {
    let shop = shop("gcc", &["-O2"]);
    let patch = built(&shop);
    let host = Host::start(&shop.target);
    let linker = Linker::new(&patch);
    let near = host.reserve(linker.len_bytes(), false);
    host.absent.borrow_mut().push("strerror".to_owned());
    match linker.link(near, &host) {
        Err(LinkError::Unresolved { symbol, object }) => {
            assert_eq!(symbol, "strerror");
            assert!(object.ends_with("new.o"), "{object}");
        }
        other => panic!("{other:?}"),
    }
    host.absent.borrow_mut().clear();
    let far = host.reserve(linker.len_bytes(), true);
    match linker.link(far, &host) {
        Err(LinkError::OutOfReach { section, kind, .. }) => {
            assert!(section.starts_with(".text."), "{section}");
            assert_eq!(kind, "R_X86_64_PC32");
        }
        other => panic!("{other:?}"),
    }
    assert_eq!(linker.link(near.offset(8), &host), Err(LinkError::NotAligned(near.offset(8))));
    assert_eq!(host.scenario(), BEFORE, "nothing was touched");
    assert!(host.end().success());
}

#[test]
fn the_same_input_gives_the_same_bytes_and_code_is_never_writable() {
    let shop = shop("gcc", &["-O2"]);
    let (one, other) = (built(&shop), built(&shop));
    assert_eq!(one.encode(), other.encode());
    let host = Host::start(&shop.target);
    let at = Addr::new(host.bias_page());
    let linked = Linker::new(&one).link(at, &host).expect("it fits");
    assert_eq!(linked, Linker::new(&other).link(at, &host).expect("it fits"));
    let kinds: Vec<_> = linked.segments.iter().map(|segment| segment.protection).collect();
    assert_eq!(kinds, [Protection::Code, Protection::ReadOnly, Protection::Data]);
    assert!(host.end().success());
}

#[test]
fn a_stripped_target_is_patched_by_what_its_code_tells() {
    for flags in
        [&["-O2"][..], &["-O2", "-no-pie", "-fno-pie"], &["-m32", "-O2"], &["-m32", "-O2", "-no-pie", "-fno-pie"]]
    {
        let shop = shop("gcc", flags);
        let stripped = shop.directory.path("stripped");
        common::run("strip", &[common::text(&shop.target), "-o", common::text(&stripped)]);
        let patch = build(&stripped, Some(&shop.old), &shop.new).unwrap_or_else(|error| panic!("{flags:?}: {error}"));
        assert!(patch.notes.iter().any(|note| note.kind == NoteKind::FoundByCode && note.symbol == "discount"));
        let addresses = |patch: &Patch| patch.functions.iter().map(|function| function.address).collect::<Vec<_>>();
        assert_eq!(addresses(&patch), addresses(&built(&shop)), "{flags:?}");
        let host = Host::start(&shop.target);
        assert_eq!(host.scenario(), BEFORE, "{flags:?}");
        host.apply(&patch);
        assert_eq!(host.scenario(), AFTER, "{flags:?}");
        assert!(host.end().success());
    }
}

#[test]
fn a_stripped_target_of_other_code_is_refused() {
    let shop = shop("gcc", &["-O2"]);
    let stripped = shop.directory.path("stripped");
    common::run("strip", &[common::text(&shop.target), "-o", common::text(&stripped)]);
    let old = shop.directory.object("gcc", &fixture("shop.c"), "old-0.o", &["-O0"]);
    let new = shop.directory.object("gcc", &fixture("shop.c"), "new-0.o", &["-O0", "-DNEW"]);
    match build(&stripped, Some(&old), &new) {
        Err(Error::Refused(refusals)) => {
            assert!(refusals.iter().any(|refusal| refusal.reason == Reason::NoSymbol && refusal.symbol == "discount"));
        }
        other => panic!("{other:?}"),
    }
}
