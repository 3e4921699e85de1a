//! Programs of either width, recorded by the command of the width that the tests are built for.

mod common;

use std::{fs, process::Command};

use common::Directory;
use serde_json::Value;

const SOURCE: &str = "#include <stdio.h>\n\
    struct large { long words[8]; };\n\
    __attribute__((noinline)) struct large made(long first) { struct large all = {{first}}; return all; }\n\
    int main(void) {\n\
        long sum = 0;\n\
        for (long turn = 0; turn < 1000; turn++) sum += made(turn).words[0];\n\
        printf(\"%ld\\n\", sum);\n\
        return sum == 499500 ? 7 : 1;\n\
    }\n";

/// A program of that width; `None` where there is no compiler for it.
fn program(directory: &Directory, flag: &str) -> Option<String> {
    let (source, path) = (directory.0.join("source.c"), directory.0.join(format!("program{flag}")));
    fs::write(&source, SOURCE).expect("a folder of our own");
    let built = Command::new("cc").args([flag, "-O1", "-o"]).arg(&path).arg(&source).status().expect("a C compiler");
    built.success().then(|| path.to_string_lossy().into_owned())
}

fn check_recorded(directory: &Directory, program: &str) {
    let output = directory.trapline(&["record", "--quiet", "-o", "trace", "--", program]);
    let told = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!((output.status.code(), &*output.stdout), (Some(7), &b"499500\n"[..]), "{told}");
    let report: Value = serde_json::from_str(&directory.text(&["report", "-i", "trace", "--json"])).expect("an object");
    let functions = report["functions"].as_array().expect("a list");
    let made = functions.iter().find(|function| function["name"] == "made").expect("the function");
    assert_eq!(made["calls"], 1000);
}

#[test]
fn a_32_bit_program_is_recorded() {
    let directory = Directory::new("widths-narrow");
    match program(&directory, "-m32") {
        Some(program) => check_recorded(&directory, &program),
        None => assert!(std::env::var_os("CI").is_none(), "there is no 32-bit compiler"),
    }
}

#[cfg(target_arch = "x86_64")]
#[test]
fn a_64_bit_program_is_recorded() {
    let directory = Directory::new("widths-wide");
    check_recorded(&directory, &program(&directory, "-m64").expect("the compiler of this machine"));
}

#[cfg(target_arch = "x86")]
#[test]
fn a_64_bit_program_is_refused_and_not_started() {
    let directory = Directory::new("widths-wide");
    let Some(program) = program(&directory, "-m64") else { return };
    let output = directory.trapline(&["record", "-o", "trace", "--", &program]);
    let told = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!((output.status.code(), output.stdout.len()), (Some(125), 0), "{told}");
    assert!(told.contains("it is a 64-bit program") && told.contains("use a 64-bit trapline"), "{told}");
    assert!(!directory.0.join("trace").exists());
}
