//! `trapline patch`, as people use it.

use std::{
    fs,
    path::{Path, PathBuf},
    process::{Command, Output},
};

/// A directory that is removed with all that is in it.
struct Directory(PathBuf);

impl Directory {
    fn new(name: &str) -> Self {
        let path = std::env::temp_dir().join(format!("trapline-cli-patch-{name}-{}", std::process::id()));
        fs::create_dir(&path).expect("the directory for temporary files is writable");
        Self(path)
    }

    fn path(&self, name: &str) -> String {
        self.0.join(name).to_str().expect("its name is UTF-8").to_owned()
    }

    /// A program, and its part compiled again with a change.
    fn program(&self, old: &str, new: &str) {
        for (name, text) in [("old", old), ("new", new)] {
            fs::write(self.0.join("part.c"), text).expect("it is writable");
            let (source, object) = (self.path("part.c"), self.path(&format!("{name}.o")));
            gcc(&["-O1", "-ffunction-sections", "-fdata-sections", "-c", &source, "-o", &object]);
        }
        gcc(&[&self.path("old.o"), "-o", &self.path("program"), "-Wl,--build-id"]);
    }

    fn build(&self, more: &[&str]) -> Output {
        let (target, old, new, output) =
            (self.path("program"), self.path("old.o"), self.path("new.o"), self.path("fix.tlp"));
        let fixed = ["patch", "build", "--target", &target, "--old", &old, "--new", &new, "-o", &output];
        trapline(&[&fixed[..], more].concat())
    }
}

impl Drop for Directory {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

fn gcc(arguments: &[&str]) {
    let output = Command::new("gcc").args(arguments).output().expect("gcc is needed for this test");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
}

fn trapline(arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_trapline")).args(arguments).output().expect("it was built")
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

const OLD: &str =
    "int stock = 1; __attribute__((noinline)) int sell(int x) { return x + stock; } int main(void) { return sell(1); }";

#[test]
fn a_patch_is_built_and_shown() {
    let directory = Directory::new("built");
    directory.program(OLD, &OLD.replace("x + stock", "x - stock"));
    let built = directory.build(&["--name", "sale", "--pin", "main"]);
    assert!(built.status.success(), "{}", text(&built.stderr));
    let shown = trapline(&["patch", "show", &directory.path("fix.tlp")]);
    assert_eq!(text(&shown.stdout), text(&built.stdout));
    let told = text(&shown.stdout);
    for part in [
        "patch      sale",
        "target     program, 64 bit, build-id ",
        "replaces   sell (",
        "pins       main",
        "left out   1 ",
    ] {
        assert!(told.contains(part), "{part}: {told}");
    }
    let json = text(&trapline(&["patch", "show", &directory.path("fix.tlp"), "--json"]).stdout);
    let json: serde_json::Value = serde_json::from_str(&json).expect("it is JSON");
    assert_eq!(json["functions"][0]["name"], "sell");
    assert_eq!(json["left_out"][0]["kind"], "unchanged");
    assert_eq!(json["left_out"][0]["symbol"], "main");
}

#[test]
fn what_cannot_be_patched_is_told_and_leaves_no_file() {
    let directory = Directory::new("refused");
    directory.program(OLD, &OLD.replace("stock = 1", "stock = 2"));
    let refused = directory.build(&["--json"]);
    assert_eq!(refused.status.code(), Some(2));
    assert!(text(&refused.stderr).contains("stock"), "{}", text(&refused.stderr));
    let json: serde_json::Value = serde_json::from_slice(&refused.stdout).expect("it is JSON");
    assert_eq!(json["refused"][0]["reason"], "changed-initialiser");
    assert!(!Path::new(&directory.path("fix.tlp")).exists());
}

#[test]
fn files_that_are_no_patches_are_refused() {
    let directory = Directory::new("shown");
    directory.program(OLD, &OLD.replace("x + stock", "x - stock"));
    let shown = trapline(&["patch", "show", &directory.path("program")]);
    assert_eq!(shown.status.code(), Some(2));
    assert!(text(&shown.stderr).contains("no trapline patch"), "{}", text(&shown.stderr));
    assert!(directory.build(&[]).status.success());
    let mut bytes = fs::read(directory.path("fix.tlp")).expect("it was just written");
    let last = bytes.len() - 1;
    bytes[last] ^= 1;
    fs::write(directory.path("fix.tlp"), bytes).expect("it is writable");
    let shown = trapline(&["patch", "show", &directory.path("fix.tlp")]);
    assert_eq!(shown.status.code(), Some(2));
    assert!(text(&shown.stderr).contains("damaged"), "{}", text(&shown.stderr));
}
