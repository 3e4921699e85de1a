//! Patches of objects that rustc makes: panics, thread-local variables and statics in new code.

mod common;

use std::path::PathBuf;

use common::{Directory, Host, build, fixture, run, text};
use trapline_patch::Patch;

const BEFORE: &str = "\
3 1 101 | 6 2 102
left old
left old
1016 1500 12
";

const AFTER: &str = "\
new 4 103 item 1+item 2 | new 7 104 item 1+item 2
left new
left new
7016 7500 14
";

/// A program of the old object, and the patch to the new one.
fn prepared(directory: &Directory, flags: &[&str], link: &[&str]) -> (PathBuf, Patch) {
    let object = |name: &str, emit: &str, more: &[&str]| {
        let to = directory.path(name);
        let source = fixture("shop.rs");
        let fixed = [text(&source), "-o", text(&to), "--emit", emit, "--crate-type=staticlib", "--crate-name=shop"];
        let others = ["--edition=2024", "-Ccodegen-units=1", "--check-cfg=cfg(new)", "-g"];
        run("rustc", &[&fixed[..], &others, flags, more].concat());
        to
    };
    let (library, old) = (object("libshop.a", "link", &[]), object("old.o", "obj", &[]));
    let new = object("new.o", "obj", &["--cfg=new"]);
    let (target, host) = (directory.path("shop"), fixture("host.c"));
    let probe = directory.write("probe.c", "__thread int trapline_probe = 5;");
    let fixed = ["-w", text(&host), text(&probe), text(&library), "-o", text(&target), "-Wl,--build-id", "-rdynamic"];
    run("gcc", &[&fixed[..], &["-lgcc_s", "-lutil", "-lpthread", "-lm", "-ldl"], link].concat());
    let patch = build(&target, Some(&old), &new).unwrap_or_else(|error| panic!("{flags:?}: {error}"));
    (target, patch)
}

fn a_patched_program_panics_and_goes_on(flags: &[&str], link: &[&str]) {
    let directory = Directory::new();
    let (target, patch) = prepared(&directory, flags, link);
    let host = Host::start(&target);
    assert_eq!(host.scenario(), BEFORE, "{flags:?}");
    let linked = host.apply(&patch);
    let unwind = linked.unwind.expect("rustc makes tables");
    assert_eq!(host.ask(&format!("register {}", unwind.start.value())), "registered");
    assert_eq!(host.scenario(), AFTER, "{flags:?}");
    assert!(host.end().success());
}

#[test]
fn rust_without_optimisation_is_patched() {
    a_patched_program_panics_and_goes_on(&["-Copt-level=0"], &[]);
}

#[test]
fn optimised_rust_is_patched() {
    a_patched_program_panics_and_goes_on(&["-Copt-level=2"], &[]);
}

#[test]
fn rust_of_32_bit_is_patched() {
    a_patched_program_panics_and_goes_on(&["-Copt-level=2", "--target=i686-unknown-linux-gnu"], &["-m32"]);
}

#[test]
fn without_unwind_tables_a_panic_is_the_end() {
    let directory = Directory::new();
    let (target, patch) = prepared(&directory, &["-Copt-level=2"], &[]);
    let host = Host::start(&target);
    host.apply(&patch);
    host.send("run");
    assert!(!host.end().success(), "or else the other tests show nothing");
}
