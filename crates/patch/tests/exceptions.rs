//! Exceptions of C++ that are thrown from, through and caught in new code.

mod common;

use common::{Directory, Host, build, fixture, run, text};
use trapline_patch::Patch;

const BEFORE: &str = "\
left thrower
came back 0
left between
1
left thrower
left between
caught one
12
left thrower
left between
caught 42
23
left thrower
came back 3
left between
4
area 10
";

const AFTER: &str = "\
left thrower
came back 0
left new between
5
left thrower
left new between
caught one
16
left thrower
left new between
caught the number 42
27
left thrower
left new between
caught text new
38
area 25
";

/// A running program with the old functions, and the patch with the new ones.
fn prepared(directory: &Directory, tool: &str, flags: &[&str]) -> (Host, Patch) {
    let old = directory.object(tool, &fixture("thrower.cc"), "old.o", flags);
    let new = directory.object(tool, &fixture("thrower.cc"), "new.o", &[flags, &["-DNEW"]].concat());
    let (target, host) = (directory.path("thrower"), fixture("host.c"));
    let link = ["-w", "-x", "c++", text(&host), "-x", "none", text(&old), "-o", text(&target), "-ldl"];
    run(tool, &[&link[..], flags, &["-Wl,--build-id", "-rdynamic"]].concat());
    let patch = build(&target, Some(&old), &new).unwrap_or_else(|error| panic!("{tool} {flags:?}: {error}"));
    (Host::start(&target), patch)
}

#[test]
fn exceptions_pass_through_new_code() {
    for (tool, flags) in [
        ("g++", &["-O0"][..]),
        ("g++", &["-O2"]),
        ("g++", &["-O2", "-fPIC"]),
        ("g++", &["-O2", "-m32"]),
        ("g++", &["-O2", "-m32", "-fno-pie", "-no-pie"]),
        ("clang++", &["-O0"]),
        ("clang++", &["-O2"]),
        ("clang++", &["-O2", "-m32"]),
    ] {
        let directory = Directory::new();
        let (host, patch) = prepared(&directory, tool, flags);
        assert_eq!(host.scenario(), BEFORE, "{tool} {flags:?}");
        let linked = host.apply(&patch);
        let unwind = linked.unwind.expect("compilers make tables");
        assert_eq!(host.ask(&format!("register {}", unwind.start.value())), "registered");
        assert_eq!(host.scenario(), AFTER, "{tool} {flags:?}");
        assert!(host.end().success());
    }
}

#[test]
fn without_unwind_tables_an_exception_is_the_end() {
    let directory = Directory::new();
    let (host, patch) = prepared(&directory, "g++", &["-O2"]);
    host.apply(&patch);
    host.send("run");
    assert!(!host.end().success(), "or else the other test shows nothing");
}
