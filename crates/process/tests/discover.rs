//! Site discovery against real compilers, linkers and the real loader.
//!
//! Each test compiles a fixture (`fixtures/discover`) for the width of this build, loads it with `dlopen`, and compares
//! what discovery finds with addresses that the loader put into a table of the fixture, or that are in its symbol table. Main executables, which
//! cannot be loaded with `dlopen`, are this very program linked anew, with a fixture in it, in the ways that executables are linked.

#[path = "discover/support.rs"]
mod support;

use std::{env, fs, path::PathBuf, process::Command};

use object::{Object, ObjectKind};
use support::*;
use trapline_engine::{Addr, Mode};
use trapline_process::discover::{
    Discovered, Needs, ObjectRole, SiteKind, SkipReason, Skipped, compiled_in_sites, loaded_objects,
};

const ENDBR: &str = "-fcf-protection=full";

// Nops of GCC's -fpatchable-function-entry.

#[test]
fn single_byte_nops_at_the_entry_are_sites_that_have_to_be_merged() {
    let library = Library::gcc("functions.c", &["-fpatchable-function-entry=5", NO_ENDBR]);
    let found = library.discover();
    assert_sites(&found, &library.functions(), 0, (SiteKind::PatchableEntry, Needs::MergeNops));
    assert_eq!(found.skipped, []);
    assert!(found.sites.iter().all(|site| site.found == [0x90; 5]), "{found:?}");
}

#[test]
fn the_site_is_behind_endbr() {
    for entry in ["-fpatchable-function-entry=5", "-fpatchable-function-entry=8,3"] {
        let library = Library::gcc("functions.c", &[entry, ENDBR]);
        let found = library.discover();
        assert_sites(&found, &library.functions(), 4, (SiteKind::PatchableEntry, Needs::MergeNops));
        assert_eq!(found.skipped, [], "{entry}");
    }
}

#[test]
fn nops_in_front_of_the_entry_are_no_part_of_the_site() {
    let library = Library::gcc("functions.c", &["-fpatchable-function-entry=16,3", NO_ENDBR]);
    let found = library.discover();
    assert_sites(&found, &library.functions(), 0, (SiteKind::PatchableEntry, Needs::MergeNops));
    assert_eq!(found.skipped, []);
}

#[test]
fn functions_with_less_than_a_call_of_nops_are_too_short() {
    for (entry, len_bytes) in [("=2", 2), ("=4", 4), ("=5,5", 0), ("=5,2", 3)] {
        for (endbr, offset) in [(NO_ENDBR, 0), (ENDBR, 4)] {
            let library = Library::gcc("functions.c", &[&format!("-fpatchable-function-entry{entry}"), endbr]);
            let found = library.discover();
            assert_eq!(found.sites, [], "{entry} {endbr}");
            let reason = SkipReason::TooShort { len_bytes };
            assert_skipped(&found, &library.functions(), offset, &reason);
        }
    }
}

#[test]
fn stripped_objects_name_what_they_export_and_count_the_rest() {
    // The nops in front do not mislead: static_function has no symbol, but the unwind table knows it.
    let library = Library::gcc("functions.c", &["-fpatchable-function-entry=16,3", NO_ENDBR, "-s"]);
    let mut functions = library.functions();
    let offset = functions[1].entry.distance_from(library.object().bias);
    functions[1].name = format!("{}+{offset:#x}", library.object().file_name());
    assert_sites(&library.discover(), &functions, 0, (SiteKind::PatchableEntry, Needs::MergeNops));
}

#[test]
fn nops_that_may_be_in_front_of_the_entry_are_not_taken_without_evidence() {
    let no_tables = ["-s", "-fno-asynchronous-unwind-tables", "-fno-unwind-tables"];
    let library =
        Library::gcc("functions.c", &[&["-fpatchable-function-entry=16,3", NO_ENDBR][..], &no_tables].concat());
    let found = library.discover();
    let [first, hidden, last] = library.functions();
    assert_sites(&found, &[first, last], 0, (SiteKind::PatchableEntry, Needs::MergeNops));
    let listed = hidden.entry.offset(-3);
    let name = format!("{}+{:#x}", library.object().file_name(), listed.distance_from(library.object().bias));
    assert_eq!(found.skipped, [Skipped { address: listed, name, reason: SkipReason::EntryUnknown }]);

    // An endbr is evidence enough.
    let library = Library::gcc("functions.c", &[&["-fpatchable-function-entry=5", ENDBR][..], &no_tables].concat());
    let found = library.discover();
    assert_eq!(found.skipped, []);
    let entries: Vec<Addr> = found.sites.iter().map(|site| site.function).collect();
    assert_eq!(entries, sorted(library.functions().map(|function| function.entry)));
}

#[test]
fn a_function_is_found_once_under_its_plainest_public_name() {
    let library = Library::gcc("aliases.c", &["-fpatchable-function-entry=5", NO_ENDBR, &fixture("entries.c")]);
    let found = library.discover();
    let function = Function { name: "plain".into(), entry: library.symbol("plain") };
    assert_sites(&found, std::slice::from_ref(&function), 0, (SiteKind::PatchableEntry, Needs::MergeNops));
    // The entries that lead nowhere are told apart; the one that is 0 stands for a function that the linker dropped.
    let [middle, data] = &found.skipped[..] else { panic!("{found:?}") };
    let reason = SkipReason::NotAtEntry { function: function.entry };
    assert_eq!(*middle, Skipped { address: function.entry.offset(8), name: function.name, reason });
    assert_eq!(data.reason, SkipReason::OutsideText);
}

#[test]
fn copies_that_the_linker_merges_are_found_once() {
    for compiler in ["g++", "clang++"] {
        if compiler == "clang++" && !clang_is_here() {
            continue;
        }
        let directory = Directory::new();
        let unit = |unit: &str| {
            let object = directory.path(&format!("unit{unit}.o"));
            let flags = ["-c", "-O2", "-fPIC", "-fpatchable-function-entry=5", NO_ENDBR];
            compile(compiler, &[&flags[..], &[&format!("-DUNIT={unit}"), &fixture("comdat.cpp")]].concat(), &object);
            object
        };
        let (one, two) = (unit("1"), unit("2"));
        let path = directory.path("comdat.so");
        compile("gcc", &["-shared", text(&one), text(&two)], &path);
        let found = Library::open(directory, path).discover();
        assert_eq!(found.skipped, []);
        let names = sorted(found.sites.into_iter().map(|site| site.name));
        // GCC 11 and 12 list all functions of a unit in one section, which goes with its first function: what unit 2 lists is
        // dropped together with its copy of shared_function (GCC bug 110729).
        let expected: &[&str] = match compiler {
            "g++" if names.len() == 2 => &["_Z15shared_functioni", "user_1"],
            _ => &["_Z15shared_functioni", "user_1", "user_2"],
        };
        assert_eq!(names, expected, "{compiler}");
    }
}

#[test]
fn functions_that_the_linker_drops_are_not_listed() {
    for compiler in ["gcc", "clang"] {
        if compiler == "clang" && !clang_is_here() {
            continue;
        }
        for linker in ["-Wl,--no-gc-sections", "-Wl,--gc-sections"] {
            let flags = ["-fpatchable-function-entry=5", NO_ENDBR, "-ffunction-sections", linker];
            let library = Library::compiled_by(compiler, "sections.c", &flags);
            let file = fs::read(&library.path).expect("just linked");
            let kept = ["dropped_one", "root", "used_one"].map(|name| find_symbol(&file, name).map(|_| name));
            let kept: Vec<&str> = kept.into_iter().flatten().collect();
            let found = library.discover();
            assert_eq!(found.skipped, []);
            assert_eq!(sorted(found.sites.iter().map(|site| site.name.as_str())), kept, "{compiler} {linker}");
            if compiler == "clang" {
                assert_eq!(kept.contains(&"dropped_one"), linker == "-Wl,--no-gc-sections");
            }
        }
    }
}

// __fentry__ calls and the nops that stand for them.

#[test]
fn fentry_nops_are_sites_as_they_are() {
    for (endbr, offset) in [(NO_ENDBR, 0), (ENDBR, 4)] {
        let library = Library::fentry(&["-mnop-mcount", endbr]);
        let found = library.discover();
        assert_sites(&found, &library.functions(), offset, (SiteKind::Fentry, Needs::Nothing));
        assert_eq!(found.skipped, []);
        assert!(found.sites.iter().all(|site| site.found == [0x0f, 0x1f, 0x44, 0, 0]), "{found:?}");
    }
}

#[test]
fn fentry_calls_are_refused() {
    let library = Library::fentry(&[NO_ENDBR]);
    let found = library.discover();
    assert_eq!(found.sites, []);
    let refused = found.skipped.iter().map(|skipped| Function { name: skipped.name.clone(), entry: skipped.address });
    assert_eq!(sorted(refused), sorted(library.functions()));
    for skipped in &found.skipped {
        assert!(matches!(skipped.reason, SkipReason::FentryCall { found } if found[0] == 0xe8), "{skipped:?}");
    }
}

#[test]
fn a_function_with_two_sites_keeps_the_one_that_needs_less() {
    let library = Library::fentry(&["-mnop-mcount", "-fpatchable-function-entry=5", NO_ENDBR]);
    let found = library.discover();
    assert_sites(&found, &library.functions(), 5, (SiteKind::Fentry, Needs::Nothing));
    assert_eq!(found.skipped.len(), NAMES.len());
    for (skipped, site) in found.skipped.iter().zip(&found.sites) {
        assert_eq!((skipped.address, &skipped.name), (site.function, &site.name));
        assert_eq!(skipped.reason, SkipReason::FunctionHasSite { site: site.address });
    }
}

// Clang.

#[test]
fn clangs_nops_are_as_long_as_the_width_allows() {
    if !clang_is_here() {
        return;
    }
    let needs_of_5_and_8 = match Mode::NATIVE {
        Mode::Bits32 => [Needs::MergeNops, Needs::MergeNops],
        Mode::Bits64 => [Needs::Nothing, Needs::SplitNop],
    };
    for (nops, needs) in ["5", "8"].into_iter().zip(needs_of_5_and_8) {
        for (endbr, offset) in [(NO_ENDBR, 0), (ENDBR, 4)] {
            let entry = format!("-fpatchable-function-entry={nops}");
            let library = Library::compiled_by("clang", "functions.c", &[&entry, endbr]);
            let found = library.discover();
            assert_sites(&found, &library.functions(), offset, (SiteKind::PatchableEntry, needs));
            assert_eq!(found.skipped, [], "{nops} {endbr}");
        }
    }
}

#[test]
fn xray_entry_sleds_are_sites_and_its_other_sleds_are_not() {
    if Mode::NATIVE == Mode::Bits32 {
        eprintln!("skipped: XRay does not exist for i386");
        return;
    }
    if !clang_is_here() {
        return;
    }
    for (endbr, offset) in [(NO_ENDBR, 0), (ENDBR, 4)] {
        // Linked by GCC: without XRay's runtime, which nothing here needs.
        let directory = Directory::new();
        let object = directory.path("functions.o");
        let flags = ["-c", "-O2", "-fPIC", "-fxray-instrument", "-fxray-instruction-threshold=1", endbr];
        compile("clang", &[&flags[..], &[&fixture("functions.c")]].concat(), &object);
        let path = directory.path("xray.so");
        compile("gcc", &["-shared", text(&object)], &path);
        let library = Library::open(directory, path);
        let found = library.discover();
        assert_sites(&found, &library.functions(), offset, (SiteKind::XrayEntry, Needs::XrayNormalise));
        assert_eq!(found.skipped, []);
        assert!(
            found.sites.iter().all(|site| site.found.len() == 11 && site.found.starts_with(&[0xeb, 9])),
            "{found:?}"
        );
    }
}

// Objects that are not as they should be, and the controls.

#[test]
fn an_object_without_lists_has_no_sites() {
    let found = Library::gcc("functions.c", &[NO_ENDBR]).discover();
    assert_eq!(found, Discovered::default());
    let objects = loaded_objects().expect("own memory");
    for vdso in objects.iter().filter(|object| object.role == ObjectRole::Vdso) {
        assert_eq!(compiled_in_sites(vdso).expect("nothing is read"), Discovered::default());
    }
}

#[test]
fn a_list_that_is_not_loaded_is_refused() {
    let library = Library::gcc("unloaded_list.c", &["-fpatchable-function-entry=5", NO_ENDBR]);
    let found = library.discover();
    assert_eq!(found.sites.iter().map(|site| site.name.as_str()).collect::<Vec<_>>(), ["listed"]);
    let reasons: Vec<&SkipReason> = found.skipped.iter().map(|skipped| &skipped.reason).collect();
    assert_eq!(reasons, [&SkipReason::SectionNotLoaded { section: "__mcount_loc" }]);
}

#[test]
fn code_that_was_changed_is_refused_with_its_bytes_and_the_rest_is_not() {
    let directory = Directory::new();
    let path = directory.path("functions.so");
    compile("gcc", &shared(&["-fpatchable-function-entry=5", NO_ENDBR], &fixture("functions.c")), &path);
    let mut file = fs::read(&path).expect("just linked");
    let patched = *b"\xcc\x90\x90\x90\x90";
    let (_, offset) = find_symbol(&file, "static_function").expect("not stripped");
    let offset = usize::try_from(offset).expect("small");
    file[offset..offset + patched.len()].copy_from_slice(&patched);
    fs::write(&path, &file).expect("own directory");

    let library = Library::open(directory, path);
    let found = library.discover();
    let [first, changed, last] = library.functions();
    assert_sites(&found, &[first, last], 0, (SiteKind::PatchableEntry, Needs::MergeNops));
    let [Skipped { address, name, reason: SkipReason::UnexpectedBytes { found: bytes } }] = &found.skipped[..] else {
        panic!("{found:?}");
    };
    assert_eq!((*address, name), (changed.entry, &changed.name));
    assert!(bytes.starts_with(&patched), "{bytes}");
}

#[test]
fn an_object_whose_file_was_replaced_or_is_gone_is_refused_whole() {
    for build_id in ["-Wl,--build-id=sha1", "-Wl,--build-id=none"] {
        let flags = ["-fpatchable-function-entry=5", NO_ENDBR, build_id];
        let library = Library::gcc("functions.c", &flags);
        let expected = library.discover();
        assert_eq!(expected.sites.len(), NAMES.len());
        let refusal = || {
            let found = library.discover();
            assert_eq!(found.sites, []);
            let [skipped] = &found.skipped[..] else { panic!("{found:?}") };
            assert_eq!((skipped.address, &skipped.name), (library.object().range.start, &library.object().file_name()));
            skipped.reason.clone()
        };
        let replace = |contents: &[u8]| {
            let new = library.path.with_extension("new");
            fs::write(&new, contents).expect("own directory");
            fs::rename(&new, &library.path).expect("own directory");
        };
        let original = fs::read(&library.path).expect("just linked");

        // The same functions at the same addresses in the same segments, with another name: only the contents differ.
        let renamed = Library::gcc("functions.c", &[&flags[..], &["-Dpublic_function=parted_function"]].concat());
        replace(&fs::read(&renamed.path).expect("just linked"));
        let what = if build_id.ends_with("none") { "dynamic symbols" } else { "build-id" };
        assert_eq!(refusal(), SkipReason::NotTheLoadedFile { what });

        let larger = Library::gcc("many.c", &["-DCOUNT=1000", build_id]);
        replace(&fs::read(&larger.path).expect("just linked"));
        assert_eq!(refusal(), SkipReason::NotTheLoadedFile { what: "load segments" });
        replace(b"#!/bin/sh\n");
        assert!(matches!(refusal(), SkipReason::MalformedFile { .. }));
        replace(&original[..original.len() / 2]);
        assert!(matches!(refusal(), SkipReason::MalformedFile { .. }));
        fs::remove_file(&library.path).expect("own directory");
        assert_eq!(refusal(), SkipReason::FileUnreadable { error: std::io::ErrorKind::NotFound });

        // A copy of what is loaded is as good as the file itself.
        replace(&original);
        assert_eq!(library.discover(), expected);
    }
}

#[test]
fn an_object_loaded_by_a_relative_path_is_found_through_the_mappings() {
    let directory = Directory::new();
    let path = directory.path("functions.so");
    compile("gcc", &shared(&["-fpatchable-function-entry=5", NO_ENDBR], &fixture("functions.c")), &path);
    let up = env::current_dir().expect("exists").ancestors().skip(1).map(|_| "..").collect::<PathBuf>();
    let relative = up.join(path.strip_prefix("/").expect("temporary directories have absolute names"));
    let library = Library::open(directory, relative);
    assert_eq!(library.object().path, fs::canonicalize(&path).expect("exists"));
    assert_eq!(library.discover().sites.len(), NAMES.len());
}

#[test]
fn a_hundred_thousand_sites_are_found_in_order() {
    let library = Library::gcc("many.c", &["-DCOUNT=100000"]);
    let started = std::time::Instant::now();
    let found = library.discover();
    eprintln!("100,000 sites in {} ms", started.elapsed().as_millis());
    assert_eq!(found.skipped, []);
    assert_eq!(found.sites.len(), 100_000);
    let first = library.symbol("many_0");
    for (index, site) in (0_i64..).zip(&found.sites) {
        assert_eq!((site.address, site.needs), (first.offset(6 * index), Needs::Nothing));
        assert_eq!(site.name, format!("many_{index}"));
    }
}

// Main executables: this program, linked in all the ways.

#[test]
fn main_executables_are_understood_however_they_are_linked() {
    let Some(cargo) = env::var_os("CARGO") else {
        eprintln!("skipped: not started by cargo, which would link the executables");
        return;
    };
    for (pie, dynamic) in [(true, true), (true, false), (false, true), (false, false)] {
        if pie && !dynamic && Mode::NATIVE == Mode::Bits32 {
            eprintln!("skipped: rustc does not link static position-independent executables for i686");
            continue;
        }
        let executable = relink(&cargo, pie, dynamic);
        let file = fs::read(&executable.0).expect("just linked");
        let expected = sorted(NAMES.map(|name| format!("{name} {:#x}", find_symbol(&file, name).expect("linked").0)));
        let file = object::File::parse(&file[..]).expect("ELF");
        assert_eq!(file.kind(), if pie { ObjectKind::Dynamic } else { ObjectKind::Executable });
        assert_eq!(file.section_by_name(".interp").is_some(), dynamic);

        let child = |command: &mut Command| {
            let args = ["child_prints_the_sites_of_its_executable", "--exact", "--ignored", "--nocapture"];
            let output = run(command.args(args));
            sorted(output.lines().filter_map(|line| Some(line.split_once("site: ")?.1.to_owned())))
        };
        let about = |how: &str| format!("{how}, position-independent: {pie}, dynamic: {dynamic}");
        assert_eq!(child(&mut Command::new(&executable.0)), expected, "{}", about("as it is"));
        if dynamic {
            let loader = match Mode::NATIVE {
                Mode::Bits32 => "/lib/ld-linux.so.2",
                Mode::Bits64 => "/lib64/ld-linux-x86-64.so.2",
            };
            assert_eq!(child(Command::new(loader).arg(&executable.0)), expected, "{}", about("through the loader"));
        }
        assert_eq!(child(Command::new(&executable.0).env(UNLINK, "1")), expected, "{}", about("deleted"));
        assert!(!executable.0.exists());
    }
}

/// Tells the child below to delete its file first.
const UNLINK: &str = "TRAPLINE_TEST_UNLINK";

#[test]
#[ignore = "a child process of the test above"]
fn child_prints_the_sites_of_its_executable() {
    if env::var_os(UNLINK).is_some() {
        fs::remove_file(env::current_exe().expect("procfs")).expect("linked for this test");
    }
    let objects = loaded_objects().expect("own memory");
    assert_eq!(objects[0].role, ObjectRole::Executable);
    let found = compiled_in_sites(&objects[0]).expect("own memory");
    assert_eq!(found.skipped, []);
    for site in &found.sites {
        assert_eq!((site.kind, site.needs), (SiteKind::PatchableEntry, Needs::MergeNops));
        println!("\nsite: {} {:#x}", site.name, site.address.distance_from(objects[0].bias));
    }
}

#[test]
fn an_object_that_was_unloaded_is_refused() {
    let this = env::current_exe().expect("procfs");
    run(Command::new(this).args(["child_looks_at_an_object_that_is_gone", "--exact", "--ignored"]));
}

#[test]
#[ignore = "a child process of the test above, so that nothing else is mapped in the object's place"]
fn child_looks_at_an_object_that_is_gone() {
    let directory = Directory::new();
    let path = directory.path("functions.so");
    compile("gcc", &shared(&["-fpatchable-function-entry=5", NO_ENDBR], &fixture("functions.c")), &path);
    let mut library = Library::open(directory, path);
    let object = library.object().clone();
    assert_eq!(compiled_in_sites(&object).expect("own memory").sites.len(), NAMES.len());
    library.close();
    let found = compiled_in_sites(&object).expect("an unloaded object is no error");
    assert_eq!(found.sites, []);
    let reasons: Vec<&SkipReason> = found.skipped.iter().map(|skipped| &skipped.reason).collect();
    assert_eq!(reasons, [&SkipReason::Unloaded], "{found:?}");
}
