//! What cannot be patched is refused, with the file, the symbol and the reason.

mod common;

use std::path::Path;

use common::{Directory, build, run, text};
use trapline_patch::{Error, NoteKind, Pair, Patch, Reason, Request};

const MAIN: &str = "int shared(int); int main(void) { return shared(1); }\n";

/// Compiles a target of `old`, and builds a patch from `old` to `new`.
fn patch_with(directory: &Directory, flags: &[&str], old: &str, new: &str, link: &[&str]) -> Result<Patch, Error> {
    let main = directory.write("main.c", MAIN);
    let (old_source, new_source) = (directory.write("part.c", old), directory.write("part-new.c", new));
    let old = directory.object("gcc", &old_source, "old.o", flags);
    let new = directory.object("gcc", &new_source, "new.o", flags);
    let target = directory.path("target");
    run("gcc", &[&["-w", text(&main), text(&old), "-o", text(&target), "-Wl,--build-id"], link].concat());
    build(&target, Some(&old), &new)
}

fn patch(old: &str, new: &str) -> Result<Patch, Error> {
    patch_with(&Directory::new(), &["-O1"], old, new, &[])
}

/// The reasons that a patch was refused for, with the symbols.
fn refused(result: Result<Patch, Error>) -> Vec<(String, Reason)> {
    match result {
        Err(Error::Refused(refusals)) => {
            assert!(refusals.iter().all(|refusal| refusal.object.ends_with("new.o")), "{refusals:?}");
            refusals.into_iter().map(|refusal| (refusal.symbol, refusal.reason)).collect()
        }
        other => panic!("{other:?}"),
    }
}

fn one(symbol: &str, reason: Reason) -> Vec<(String, Reason)> {
    vec![(symbol.to_owned(), reason)]
}

#[test]
fn changed_variables_are_refused() {
    let old = "int stock = 4; static int sold[2] = {1}; int shared(int x) { sold[1]++; return x + stock + sold[0]; }";
    let value = old.replace("stock = 4", "stock = 5");
    assert_eq!(refused(patch(old, &value)), one("stock", Reason::ChangedInitialiser));
    let size = old.replace("sold[2]", "sold[3]");
    assert_eq!(refused(patch(old, &size)), one("sold", Reason::ChangedLayout));
    // The control: a change of code alone is patched.
    let code = old.replace("x + stock", "x - stock");
    let patch = patch(old, &code).expect("nothing else changed");
    assert_eq!(patch.functions.len(), 1);
    assert_eq!(patch.functions[0].name, "shared");
}

#[test]
fn the_same_variable_without_an_old_object_is_compared_with_the_target() {
    let directory = Directory::new();
    let old = "int stock = 4; int empty; int shared(int x) { empty++; return x + stock; }";
    patch_with(&directory, &["-O1"], old, &old.replace("x + ", "x - "), &[]).expect("only code changed");
    let (target, new) = (directory.path("target"), directory.path("new.o"));
    let alone = build(&target, None, &new).expect("only code changed");
    assert_eq!(alone.functions.len(), 1);
    let changed = directory.write("changed.c", &old.replace("stock = 4", "stock = 5"));
    let changed = directory.object("gcc", &changed, "changed-new.o", &["-O1"]);
    assert_eq!(refused(build(&target, None, &changed)), one("stock", Reason::ChangedInitialiser));
}

#[test]
fn changed_constructors_are_refused() {
    let old = "static int stock; __attribute__((constructor)) static void open_shop(void) { stock = 3; } \
               int shared(int x) { return x + stock; }";
    assert_eq!(refused(patch(old, &old.replace("stock = 3", "stock = 4"))), one("open_shop", Reason::ChangedStart));
    let without = old.replace("__attribute__((constructor))", "__attribute__((used))");
    assert_eq!(refused(patch(old, &without)), one(".init_array", Reason::ChangedStart));
}

#[test]
fn constants_that_others_see_are_refused_and_own_ones_come_along() {
    let old = "const int price[2] = {3, 5}; int shared(int x) { return price[x & 1]; }";
    assert_eq!(refused(patch(old, &old.replace("{3, 5}", "{3, 6}"))), one("price", Reason::ChangedConstant));
    let old = old.replace("const int", "static const int");
    let patch = patch(&old, &old.replace("{3, 5}", "{3, 6}")).expect("nobody else sees it");
    assert_eq!(patch.functions.len(), 1, "the function that uses it is replaced, although its code is the same");
    assert!(patch.notes.iter().any(|note| note.kind == NoteKind::ChangedConstant && note.symbol == "price"));
}

#[test]
fn new_thread_local_variables_are_refused() {
    let old = "int shared(int x) { return x; }";
    let new = "static __thread int visits; int shared(int x) { return x + visits++; }";
    assert_eq!(refused(patch(old, new)), one("visits", Reason::NewThreadLocal));
}

#[test]
fn functions_in_one_section_and_variables_in_one_section_are_refused() {
    let directory = Directory::new();
    let old = "static int one, two; __attribute__((noinline)) static int helper(int x) { return x * 7 + one++; } \
               int shared(int x) { return helper(x) + two++; }";
    let new = old.replace("x * 7", "x * 9");
    let result = patch_with(&directory, &["-O1", "-fno-function-sections"], old, &new, &[]);
    let found = refused(result);
    assert!(found.iter().all(|(_, reason)| *reason == Reason::SharedSection) && !found.is_empty(), "{found:?}");
    let result = patch_with(&directory, &["-O1", "-fno-data-sections"], old, &new, &[]);
    let found = refused(result);
    assert!(found.iter().all(|(_, reason)| *reason == Reason::SharedData) && !found.is_empty(), "{found:?}");
}

#[test]
fn unsupported_relocations_are_named() {
    let old = "extern __thread int visits; __thread int visits; int shared(int x) { return x + visits; }";
    let new = old.replace("x + visits", "x - visits");
    let flags = ["-O1", "-fPIC", "-mtls-dialect=gnu2"];
    match patch_with(&Directory::new(), &flags, old, &new, &[]) {
        Err(Error::Refused(refusals)) => {
            assert!(refusals.iter().all(|refusal| refusal.reason == Reason::UnsupportedRelocation));
            assert!(refusals[0].detail.contains("R_X86_64_GOTPC32_TLSDESC"), "{}", refusals[0]);
            assert!(refusals[0].detail.contains(".text.shared"), "{}", refusals[0]);
        }
        other => panic!("{other:?}"),
    }
}

#[test]
fn nothing_changed_and_no_build_id_are_errors_that_say_so() {
    let old = "int shared(int x) { return x + 1; }";
    assert!(matches!(patch(old, old), Err(Error::Nothing(_))));
    let result = patch_with(&Directory::new(), &["-O1"], old, &old.replace('1', "2"), &["-Wl,--build-id=none"]);
    match result {
        Err(Error::Malformed { what, .. }) => assert!(what.contains("--build-id"), "{what}"),
        other => panic!("{other:?}"),
    }
}

#[test]
fn objects_of_another_width_and_other_files_are_refused() {
    let directory = Directory::new();
    let old = "int shared(int x) { return x + 1; }";
    patch_with(&directory, &["-O1"], old, &old.replace('1', "2"), &[]).expect("it can be patched");
    let target = directory.path("target");
    let narrow = directory.object("gcc", &directory.path("part.c"), "narrow.o", &["-m32"]);
    assert!(matches!(build(&target, None, &narrow), Err(Error::OtherWidth { .. })));
    for (file, hint) in [(target.as_path(), "-c"), (Path::new("/etc/passwd"), "cannot be read")] {
        match build(&target, None, file) {
            Err(Error::Malformed { what, .. }) => assert!(what.contains(hint), "{what}"),
            other => panic!("{other:?}"),
        }
    }
    assert!(matches!(build(&target, None, Path::new("/nonexistent.o")), Err(Error::Unreadable { .. })));
}

#[test]
fn a_static_name_that_the_target_has_twice_is_told_apart_by_its_file() {
    let directory = Directory::new();
    let part = "__attribute__((noinline)) static int helper(int x) { return x * 7; } int NAME(int x) { return helper(x) + 1; }";
    let first = directory.write("first.c", &part.replace("NAME", "shared"));
    let second = directory.write("second.c", &part.replace("NAME", "other").replace('7', "5"));
    let main = directory.write("main.c", MAIN);
    let old = directory.object("gcc", &first, "old.o", &["-O1"]);
    let other = directory.object("gcc", &second, "other.o", &["-O1"]);
    let target = directory.path("target");
    run("gcc", &["-w", text(&main), text(&old), text(&other), "-o", text(&target), "-Wl,--build-id"]);
    directory.write("first.c", &part.replace("NAME", "shared").replace("x * 7", "x * 9"));
    let new = directory.object("gcc", &first, "new.o", &["-O1"]);
    let patch = build(&target, Some(&old), &new).expect("the file's name tells");
    assert_eq!(patch.functions.len(), 1);
    assert!(patch.notes.iter().all(|note| note.kind != NoteKind::OtherBuild), "it is the right one of the two");
    let moved = directory.write("third.c", &std::fs::read_to_string(&first).expect("it was just written"));
    let moved = directory.object("gcc", &moved, "moved-new.o", &["-O1"]);
    assert_eq!(refused(build(&target, Some(&old), &moved)), one("helper", Reason::Ambiguous));
}

#[test]
fn pins_and_callbacks_are_in_the_patch() {
    let directory = Directory::new();
    let old = "int shared(int x) { return x + 1; }";
    let new = "int shared(int x) { return x + 2; } int trapline_pre_apply(void) { return 0; }";
    patch_with(&directory, &["-O1"], old, new, &[]).expect("it can be patched");
    let request = |pin: &str| Request {
        target: directory.path("target"),
        pairs: vec![Pair { old: Some(directory.path("old.o")), new: directory.path("new.o") }],
        name: Some("fix".to_owned()),
        pins: vec![pin.to_owned()],
        allow_inlined: false,
    };
    let patch = trapline_patch::build(&request("main")).expect("main can be pinned");
    assert_eq!(patch.name, "fix");
    assert_eq!(patch.pins[0].name, "main");
    assert_eq!(patch.callbacks.len(), 1);
    assert!(matches!(trapline_patch::build(&request("maim")), Err(Error::NoSuchPin { .. })));
}

#[test]
fn types_that_changed_are_refused_where_debugging_information_tells() {
    let directory = Directory::new();
    let old = "struct till { int sum; int count; }; static struct till till; struct till *other; \
               int shared(int x) { till.sum += x; other = &till; return till.sum + till.count++; }";
    // Neither sizes nor initial values tell: members changed places.
    let new = old.replace("int sum; int count;", "int count; int sum;");
    let found = refused(patch_with(&directory, &["-O1", "-g"], old, &new, &[]));
    assert_eq!(found, one("till", Reason::ChangedLayout));
    // The control: without it, nothing tells.
    patch_with(&Directory::new(), &["-O1", "-g0"], old, &new, &[]).expect("it cannot be told");
    let grown = old
        .replace("int count; };", "int count; int more; };")
        .replace("static struct till till;", "")
        .replace("till.", "other->")
        .replace("other = &till;", "");
    let before = grown.replace("int more;", "");
    let patch =
        patch_with(&Directory::new(), &["-O1", "-g"], &before, &grown.replace("other->count++", "other->more++"), &[]);
    let patch = patch.expect("a pointer is a pointer");
    assert!(patch.notes.iter().any(|note| note.kind == NoteKind::ChangedPointee && note.symbol == "other"));
}

#[test]
fn callers_of_a_changed_signature_are_replaced_and_others_told() {
    let old = "__attribute__((noinline)) long helper(int x) { return x; } int shared(int x) { return (int)helper(x); }";
    let new = old.replace("long helper(int x)", "long helper(unsigned char x)");
    let patch = patch_with(&Directory::new(), &["-O1", "-g"], old, &new, &[]).expect("it can be patched");
    let names: Vec<_> = patch.functions.iter().map(|function| function.name.as_str()).collect();
    assert!(names.contains(&"helper") && names.contains(&"shared"), "{names:?}");
    assert!(patch.notes.iter().any(|note| note.kind == NoteKind::ChangedSignature && note.symbol == "helper"));
}

#[test]
fn copies_that_were_inlined_elsewhere_are_named() {
    let directory = Directory::new();
    let main = directory.write(
        "main.c",
        "int shared(int); int (*hook)(int) = shared; int main(int count, char **arguments) { return shared(count); }",
    );
    let part = "int shared(int x) { return x * 7; }\nint twice(int x) { return 2 * shared(x); }";
    let (old_source, new_source) =
        (directory.write("part.c", part), directory.write("part-new.c", &part.replace('7', "9")));
    let flags = ["-O2", "-g", "-gz=none"];
    let old = directory.object("gcc", &old_source, "old.o", &flags);
    let new = directory.object("gcc", &new_source, "new.o", &flags);
    let target = directory.path("target");
    run("gcc", &["-g", "-gz=none", text(&main), text(&old), "-o", text(&target), "-Wl,--build-id"]);
    let patch = build(&target, Some(&old), &new).expect("both are in the same object");
    assert_eq!(patch.functions.len(), 2, "the function with the copy differs, and is replaced");
    // Another object has a copy, and that stays.
    let both = directory.write("both.c", &format!("{part}\nint other(int x) {{ return shared(x) + 1; }}"));
    let whole = directory.object("gcc", &both, "whole.o", &flags);
    run("gcc", &["-g", "-gz=none", text(&main), text(&whole), "-o", text(&target), "-Wl,--build-id"]);
    assert_eq!(refused(build(&target, Some(&old), &new)), one("shared", Reason::Inlined));
    let request = Request {
        target,
        pairs: vec![Pair { old: Some(old), new }],
        name: None,
        pins: Vec::new(),
        allow_inlined: true,
    };
    let patch = trapline_patch::build(&request).expect("it is allowed");
    let note = patch.notes.iter().find(|note| note.kind == NoteKind::Inlined).expect("it is told");
    assert_eq!((note.symbol.as_str(), note.detail.as_str()), ("shared", "into other"));
}
