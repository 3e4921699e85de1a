//! Programs of both widths in one trace.

use trapline_testsuite::{
    compare,
    program::{Optimised, Program},
    run::{Command, End},
    scratch::Scratch,
    trace::{Report, ask},
    trapline,
};

/// A 64-bit shell that starts the program in both widths, one after the other and one from the other.
fn tree(folder: &Scratch) -> Command {
    for (name, flags) in [("wide", &[][..]), ("narrow", &["-m32", "-msse2", "-mfpmath=sse"])] {
        let program = Program::of(&["arguments.c"]).flags(flags);
        let built = program.build(Optimised::Yes, folder.path());
        std::fs::rename(&built[0], folder.join(name)).expect("it was just built");
    }
    Command::new(["/bin/sh", "-c", "./wide && ./narrow && ./wide && (./narrow; exit 7)"], folder.path())
}

#[test]
fn a_tree_of_both_widths_is_one_trace() {
    let folder = Scratch::new();
    let command = tree(&folder);
    let bare = command.run();
    assert_eq!(bare.end, End::Status(7), "{}", bare.error_text());
    for options in [&[][..], &["--lib", "*"]] {
        let trace = folder.join("trace");
        let outcome = command.behind(trapline::record(&trace, options)).run();
        assert_eq!(compare::same(&bare, &outcome), Vec::<String>::new(), "{options:?}");
        let report = Report::read(&trace).expect("a trace");
        let calls = |name: &str| report.calls.get(name).copied().unwrap_or(0);
        // What only one of the two has, and what both have.
        assert_eq!((calls("wide"), calls("takes_off"), calls("many")), (2000, 2000, 4000), "{options:?}");
        assert_eq!(report.losses(), [], "{options:?}");
    }
}

#[test]
fn modules_of_both_widths_are_listed() {
    let folder = Scratch::new();
    let trace = folder.join("trace");
    let outcome = tree(&folder).behind(trapline::record(&trace, &["--lib", "libc.so*"])).run();
    assert_eq!(outcome.end, End::Status(7), "{}", outcome.error_text());
    let info = ask("info", &trace).expect("a trace").to_string();
    let libraries = info.matches("/libc.so.6\"").count();
    assert_eq!(libraries, 2, "the C library of each: {info}");
}
