//! Compilers, and what they make.

use std::{env, fs, path::Path, process};

use trapline_testsuite::{
    run::{Command, End},
    scratch::Scratch,
    stock::Stock,
};

/// Where the toolchain in use is installed.
fn toolchain() -> String {
    let output = process::Command::new("rustc").args(["--print", "sysroot"]).output().expect("a compiler");
    String::from_utf8(output.stdout).expect("a path that is UTF-8").trim().to_owned()
}

#[test]
fn cargo_build_with_all_that_it_starts() {
    let folder = Scratch::new();
    let toolchain = toolchain();
    let write = |name: &str, content: &str| fs::write(folder.join(name), content).expect("a folder of our own");
    fs::create_dir(folder.join("src")).expect("a folder of our own");
    write("Cargo.toml", "[package]\nname = \"small\"\nversion = \"0.1.0\"\nedition = \"2024\"\n[workspace]\n");
    write("build.rs", "fn main() { println!(\"cargo::rustc-env=BUILT=by a script\"); }\n");
    write("src/main.rs", "fn main() { println!(\"built {} {:?}\", env!(\"BUILT\"), [1, 2, 3].iter().rev()); }\n");
    let script = format!("rm -rf target; {toolchain}/bin/cargo build -q --offline && exec target/debug/small");
    let command = Command::new(["/bin/sh", "-c", &script], folder.path())
        .env("PATH", format!("{toolchain}/bin:/usr/bin:/bin"))
        .env("CARGO_HOME", folder.join("cargo-home"));
    let bare = command.run();
    assert!(bare.text().starts_with("built by a script"), "{}", bare.error_text());
    Stock::of(command).run();
}

/// Thread ids differ from run to run.
fn without_numbers(text: &str) -> String {
    text.chars().filter(|char| !char.is_ascii_digit()).collect()
}

#[test]
fn a_program_on_the_threads_of_tokio() {
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/tokio");
    let target = Path::new(env!("CARGO_TARGET_TMPDIR")).join("tokio");
    let cargo = env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let mut build = process::Command::new(cargo);
    build.args(["build", "--quiet", "--locked", "--target-dir"]).arg(&target).current_dir(source);
    let outcome = build.output().expect("cargo starts");
    assert!(outcome.status.success(), "{}", String::from_utf8_lossy(&outcome.stderr));
    let command = Command::new([target.join("debug/echoes")], &target);
    let bare = command.run();
    assert_eq!((bare.end, bare.text().as_str()), (End::Status(0), "68000 true\n"), "{}", bare.error_text());
    Stock::of(command.clone()).normalise(without_numbers).run();
}
