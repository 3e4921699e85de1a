//! What is found in files that compilers made: exceptions, constructors, relocated text, Go, names.

mod common;

use std::{
    fs,
    path::{Path, PathBuf},
};

use common::{Directory, fixture, named, run, text};
use trapline_image::{Function, Image, NoFunction, Reason, Verdict};

/// Compiles `source` with `tool`.
fn compile(directory: &Directory, tool: &str, source: &str, flags: &[&str]) -> PathBuf {
    let (from, to) = (directory.path("source.cc"), directory.path("fixture"));
    fs::write(&from, source).expect("the directory is writable");
    let language = if tool == "g++" { "c++" } else { "c" };
    run(tool, &[&["-x", language, text(&from), "-o", text(&to)], flags].concat());
    to
}

fn open(path: &Path) -> Image {
    Image::open(path).expect("it is an ELF file")
}

#[test]
fn cpp_names_are_demangled_and_cold_parts_are_left_out() {
    let directory = Directory::new();
    let source = "#include <stdexcept>\nnamespace shop { struct Till { int sum; int add(int price); }; }\n\
                  __attribute__((noinline)) int shop::Till::add(int price) { if (__builtin_expect(price < 0, 0)) throw std::runtime_error(\"negative\"); \
                  return sum += price; }\n\
                  int main(int count, char **) { shop::Till till{0}; try { return till.add(count - 2); } catch (std::exception &) { return 7; } }";
    let image = open(&compile(&directory, "g++", source, &["-O2"]));
    let (_, add) = named(&image, "shop::Till::add(int)");
    assert!(matches!(add.verdict, Verdict::Traced(_)));
    let cold: Vec<_> = image.left_out().iter().filter(|other| other.why == NoFunction::PartName).collect();
    let names: Vec<_> = cold.iter().filter_map(|other| other.name.as_deref()).collect();
    assert!(names.contains(&"_ZN4shop4Till3addEi.cold"), "{names:?}");
    assert!(image.functions().iter().all(|function| !function.name.contains("cold")));
}

#[test]
fn stripped_parts_with_landing_places_are_no_functions() {
    let directory = Directory::new();
    let source = "struct Guard { ~Guard(); }; int risky(int); void note(const char *);\n\
                  int careful(int x) { Guard guard; try { return risky(x) + 1; } catch (int code) { note(\"caught\"); return code; } }";
    let path = compile(&directory, "g++", source, &["-O2", "-fPIC", "-shared", "-freorder-blocks-and-partition"]);
    let functions = |image: &Image| image.functions().iter().map(|function| function.address).collect::<Vec<_>>();
    let with_names = open(&path);
    run("strip", &[text(&path)]);
    let stripped = open(&path);
    let parts = |image: &Image| {
        image.left_out().iter().any(|other| matches!(other.why, NoFunction::PartName | NoFunction::FrameAtEntry))
    };
    assert!(parts(&with_names) && parts(&stripped), "or else this test shows nothing");
    for address in functions(&stripped) {
        assert!(functions(&with_names).contains(&address), "{address:#x}");
    }
}

#[test]
fn aliases_are_one_function() {
    let directory = Directory::new();
    let source = "int __real_name(int x) { return 3 * x; }\nextern int name(int) __attribute__((alias(\"__real_name\")));\n\
                  extern int weak_name(int) __attribute__((weak, alias(\"__real_name\")));\nint main(void) { return name(1); }";
    let image = open(&compile(&directory, "gcc", source, &["-O1"]));
    let (_, function) = named(&image, "name");
    assert_eq!(function.aliases, ["__real_name", "weak_name"]);
    assert_eq!(image.functions().iter().filter(|other| other.address == function.address).count(), 1);
}

#[test]
fn constructors_without_names_or_unwind_information_are_found() {
    let directory = Directory::new();
    let source = "static int count; __attribute__((constructor)) static void first(void) { count++; } int main(void) { return count; }";
    let flags = ["-O1", "-fno-asynchronous-unwind-tables", "-fno-unwind-tables"];
    let path = compile(&directory, "gcc", source, &flags);
    let first = named(&open(&path), "first").1.address;
    let main = named(&open(&path), "main").1.address;
    run("strip", &[text(&path)]);
    let stripped = open(&path);
    let has = |address: u64| stripped.functions().iter().any(|function| function.address == address);
    assert!(has(first));
    assert!(!has(main), "nothing in the file says that there is a function");
    for name in ["_start", "_init", "_fini"] {
        named(&stripped, name);
    }
}

#[test]
fn text_that_the_dynamic_linker_changes_is_left_alone() {
    let directory = Directory::new();
    let source = "extern int elsewhere; int value; int near_it(void) { return elsewhere; }\nint far_from_it(int x) { return x * 1000003 + 7; }\n\
                  __asm__(\".globl moved\\n.type moved,@function\\nmoved: movabs $value, %rax\\n ret\\n.size moved, .-moved\");";
    let image = open(&compile(&directory, "gcc", source, &["-O1", "-shared", "-fPIC", "-Wl,-z,notext"]));
    assert_eq!(named(&image, "moved").1.verdict, Verdict::Untraced(Reason::TextRelocation));
    assert!(named(&image, "far_from_it").1.plan().is_some());
}

#[test]
fn calls_of_a_profiler_are_known_however_they_are_compiled() {
    let directory = Directory::new();
    let source = "int add(int a, int b) { return a * 1000003 + b; }\nint main(void) { return add(1, 2); }";
    let ways: [(&str, &[&str], u64); 8] = [
        ("gcc", &["-pie", "-fPIE"], 6),
        ("gcc", &["-pie", "-fPIE", "-fcf-protection=full"], 4 + 6),
        ("gcc", &["-shared", "-fPIC"], 6),
        ("gcc", &["-no-pie", "-fno-pie"], 5),
        ("gcc", &["-no-pie", "-fno-pie", "-fcf-protection=full", "-Wl,-z,ibtplt,-z,now"], 4 + 5),
        // The function is in the file, and the linker makes the call a direct one.
        ("gcc", &["-static-pie", "-fPIE"], 6),
        ("clang", &["-pie", "-fPIE"], 5),
        ("clang", &["-shared", "-fPIC"], 5),
    ];
    let skipped = |image: &Image, address: u64| {
        let function = image.functions().iter().find(|function| function.address == address);
        function.and_then(Function::plan).map(|plan| plan.window_at - address)
    };
    for (compiler, flags, expected) in ways {
        let path = compile(&directory, compiler, source, &[&["-O2", "-pg", "-mfentry"], flags].concat());
        let add = named(&open(&path), "add").1.address;
        assert_eq!(skipped(&open(&path), add), Some(expected), "{compiler} {flags:?}");
        run("strip", &[text(&path)]);
        // Nobody knows what is called then, if the file has the function.
        let expected = if flags[0] == "-static-pie" { 0 } else { expected };
        assert_eq!(skipped(&open(&path), add), Some(expected), "{compiler} {flags:?}, stripped");
    }
}

#[test]
fn go_programs_are_entry_only() {
    let directory = Directory::new();
    let source =
        "int main(void) { return 0; }\n__attribute__((section(\".note.go.buildid\"))) const char id[] = \"x\";";
    let image = open(&compile(&directory, "gcc", source, &["-O1"]));
    assert_eq!(named(&image, "main").1.plan().and_then(|plan| plan.entry_only), Some(Reason::GoStack));
    let other = open(&compile(&directory, "gcc", "int main(void) { return 0; }", &["-O1"]));
    assert_eq!(named(&other, "main").1.plan().and_then(|plan| plan.entry_only), None);
}

#[test]
fn build_ids_are_what_readelf_prints() {
    let directory = Directory::new();
    let path =
        compile(&directory, "gcc", "int main(void) { return 0; }", &["-O1", "-Wl,--build-id=0x0123456789abcdef"]);
    assert_eq!(open(&path).build_id(), Some(&[0x01, 0x23, 0x45, 0x67, 0x89, 0xab, 0xcd, 0xef][..]));
}

#[test]
fn files_without_section_headers_keep_the_functions_of_their_unwind_information() {
    let directory = Directory::new();
    let path = directory.path("shapes");
    run("gcc", &["-O1", "-no-pie", "-fno-pie", &fixture("harness.c"), &fixture("shapes.S"), "-o", text(&path)]);
    let whole = open(&path);
    let mut bytes = fs::read(&path).expect("it was just linked");
    // e_shoff, e_shnum and e_shstrndx.
    bytes[40..48].fill(0);
    bytes[60..64].fill(0);
    let headless = Image::parse(bytes, "headless").expect("it can still be run");
    let (_, plain) = named(&whole, "plain");
    let found = headless.functions().iter().find(|function| function.address == plain.address);
    assert_eq!(found.map(|function| &*function.name), Some(&*format!("headless+{:#x}", plain.address)));
}

#[test]
fn code_of_32_bits_is_read_as_such() {
    let directory = Directory::new();
    let path = directory.path("fixture.o");
    let source = directory.path("source.s");
    let code = ".code32\n.globl first\n.type first,@function\nfirst: push %ebp\n mov %esp,%ebp\n mov 8(%ebp),%eax\n pop %ebp\n ret\n.size first,.-first\n\
                .globl takes_off\n.type takes_off,@function\ntakes_off: mov 8(%esp),%eax\n add 4(%esp),%eax\n ret $8\n.size takes_off,.-takes_off\n\
                .globl thunk\n.type thunk,@function\nthunk: mov (%esp),%ebx\n ret\n lea 0(%esi),%esi\n.size thunk,4\n";
    fs::write(&source, code).expect("the directory is writable");
    run("as", &["--32", text(&source), "-o", text(&path)]);
    let linked = directory.path("fixture");
    run("ld", &["-m", "elf_i386", "-shared", text(&path), "-o", text(&linked)]);
    let image = open(&linked);
    assert_eq!(image.mode().bitness(), 32);
    assert_eq!(named(&image, "first").1.plan().map(|plan| (plan.window_bytes, plan.entry_only)), Some((6, None)));
    assert_eq!(named(&image, "first").1.plan().and_then(|plan| plan.popped_bytes), Some(0));
    assert_eq!(named(&image, "takes_off").1.plan().and_then(|plan| plan.popped_bytes), Some(8));
    assert!(image.function_named("thunk").is_none());
    let left_out = image.left_out().iter().find(|one| one.name.as_deref() == Some("thunk"));
    assert_eq!(left_out.map(|one| one.why), Some(NoFunction::PcThunk));
}

#[test]
fn a_file_that_cannot_be_read_is_named() {
    let error = Image::open("/nonexistent/file".as_ref()).expect_err("there is no such file");
    assert!(error.to_string().contains("/nonexistent/file"), "{error}");
}
