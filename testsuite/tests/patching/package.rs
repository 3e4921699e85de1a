//! A fix that a distribution ships as source, applied to the library that it ships as code, in a process that runs.
//!
//! The library has neither symbols nor debugging information. Its old object is compiled again from the package's source with the package's flags, and has the same code:
//! so its functions are found.

use std::{
    fs,
    io::{BufRead, BufReader, Lines, Write},
    path::{Path, PathBuf},
    process::{Child, ChildStdin, ChildStdout, Command, Stdio},
};

use trapline_testsuite::{
    run,
    scratch::Scratch,
    snapshot::{Own, Snapshot},
    trapline,
};

use crate::target::trapline_of;

const PACKAGE: &str = "jq";

/// Without it paths of any depth are followed, by recursion. It changes one file.
const FIX: &str = "CVE-2026-33947.patch";

/// Has a shell do something that has to succeed, and says what it prints.
fn shell(folder: &Path, script: &str) -> String {
    let outcome = run::Command::new(["/bin/sh", "-c", script], folder).run();
    assert!(outcome.end == run::End::Status(0), "{script}: {}{}", outcome.text(), outcome.error_text());
    outcome.text()
}

/// Unpacks the newest source of the package that can be had, and has the fix. The system's own sources of packages are asked, and its lists are left as they are.
fn source(folder: &Path) -> PathBuf {
    const DEBIAN: &str = "debian-archive-keyring";
    let mut sources = String::new();
    for entry in fs::read_dir("/etc/apt/sources.list.d").expect("Debian's folder").flatten() {
        let text = fs::read_to_string(entry.path()).unwrap_or_default();
        if text.contains(DEBIAN) && entry.path().extension().is_some_and(|kind| kind == "sources") {
            sources.push_str(&text.replace("Types: deb\n", "Types: deb-src\n"));
            sources.push('\n');
        }
    }
    let old_form = fs::read_to_string("/etc/apt/sources.list").unwrap_or_default();
    let old_form = format!("\n{old_form}").replace("\ndeb ", "\ndeb-src ");
    let own = folder.to_str().expect("a plain name");
    let settings = format!(
        "Dir::Etc::sourcelist \"{own}/sources.list\";\nDir::Etc::sourceparts \"{own}/parts\";\nDir::State::lists \"{own}/lists\";\n\
         Dir::Cache \"{own}/cache\";\n"
    );
    shell(folder, "mkdir -p parts lists/partial cache/archives/partial");
    for (name, text) in [("parts/own.sources", sources), ("sources.list", old_form), ("apt.conf", settings)] {
        fs::write(folder.join(name), text).expect("a folder of our own");
    }
    let apt = "export APT_CONFIG=$PWD/apt.conf;";
    shell(folder, &format!("{apt} apt-get -q update"));
    let versions = shell(folder, &format!("{apt} apt-cache showsrc {PACKAGE} | sed -n 's/^Version: //p' | sort -rV"));
    for version in versions.lines() {
        // Lists may be newer than what there is.
        let script =
            format!("{apt} apt-get -q source --only-source {PACKAGE}={version} >/dev/null && echo {PACKAGE}-*/");
        let outcome = run::Command::new(["/bin/sh", "-c", &script], folder).run();
        let tree = folder.join(outcome.text().trim());
        if outcome.end == run::End::Status(0) && tree.join("debian/patches").join(FIX).exists() {
            return tree;
        }
    }
    panic!("no source of {PACKAGE} with {FIX}: {versions}");
}

/// The object of the file that the fix changes, as the package compiles it.
fn object(tree: &Path, to: &Path) {
    let flags = shell(tree, "DEB_BUILD_MAINT_OPTIONS=hardening=+all dpkg-buildflags --get CFLAGS");
    let more = shell(tree, "DEB_BUILD_MAINT_OPTIONS=hardening=+all dpkg-buildflags --get CPPFLAGS");
    let (flags, more, to) = (flags.trim(), more.trim(), to.display());
    let sections = "-ffunction-sections -fdata-sections";
    let script =
        format!("cd src && cc {more} -D_GNU_SOURCE=1 {flags} -std=gnu99 -fPIC -DPIC {sections} -c jv_aux.c -o {to}");
    shell(tree, &script);
}

/// The program that runs, one line of input for one of output.
struct Filter {
    child: Child,
    input: ChildStdin,
    output: Lines<BufReader<ChildStdout>>,
}

impl Filter {
    fn start() -> Self {
        let filter = ". as $depth | null | try (setpath([range($depth) | 0]; 7) | flatten) catch .";
        let mut command = Command::new("/usr/bin/jq");
        command.args(["-c", "--unbuffered", filter]).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::null());
        let mut child = command.spawn().expect("jq is installed");
        let (input, output) = (child.stdin.take().expect("a pipe"), child.stdout.take().expect("a pipe"));
        Self { child, input, output: BufReader::new(output).lines() }
    }

    fn ask(&mut self, depth: u32) -> Option<String> {
        writeln!(self.input, "{depth}").expect("a program that listens");
        self.output.next()?.ok()
    }

    fn is(&mut self, depth: u32, answer: &str) {
        assert_eq!(self.ask(depth).as_deref(), Some(answer), "at a depth of {depth}");
    }

    fn trapline(&self, words: &[&str]) {
        let outcome = trapline_of(self.child.id(), &[words, &["--deadline", "60"]].concat());
        assert!(outcome.is_good(), "{}", outcome.error);
    }
}

impl Drop for Filter {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[test]
#[ignore = "gets the source of a package; the library that is installed must not have the fix"]
fn a_fix_of_the_distribution_is_applied_to_its_library() {
    const ACCEPTED: u32 = 10_000;
    const FATAL: u32 = 3_000_000;
    const REFUSED: &str = "\"Path too deep\"";
    let mut filter = Filter::start();
    filter.is(ACCEPTED, "[7]");
    let answer = filter.ask(ACCEPTED + 1);
    assert_eq!(
        answer.as_deref(),
        Some("[7]"),
        "the installed libjq1 has the fix: install an older one to see it applied"
    );
    let before = Snapshot::of(filter.child.id());

    let scratch = Scratch::new();
    let tree = source(scratch.path());
    let (old, new, patch) = (scratch.join("old.o"), scratch.join("new.o"), scratch.join("fix.tlp"));
    // Later fixes are not in what is installed.
    shell(
        &tree,
        &format!(
            "for one in $(sed -n '/{FIX}/,$p' debian/patches/series | tac); do patch -R -p1 -s -f <debian/patches/$one || exit; done"
        ),
    );
    object(&tree, &old);
    shell(&tree, &format!("patch -p1 -s <debian/patches/{FIX}"));
    object(&tree, &new);
    let library = fs::read_to_string(format!("/proc/{}/maps", filter.child.id())).expect("its mappings");
    let library =
        library.lines().find(|line| line.contains("/libjq.so")).and_then(|line| line.split_whitespace().nth(5));
    let mut build = Command::new(trapline::path());
    build.args(["patch", "build", "--name", "fix", "--target", library.expect("it is loaded"), "--old"]).arg(&old);
    let output = build.arg("--new").arg(&new).arg("-o").arg(&patch).output().expect("a command that starts");
    let told = [output.stdout, output.stderr].map(|bytes| String::from_utf8_lossy(&bytes).into_owned()).concat();
    assert!(output.status.success(), "{told}");
    println!("{told}");
    assert!(told.contains("replaces   jv_setpath") && !told.contains("other code than the old object"), "{told}");

    let patch = patch.to_str().expect("a plain name");
    for _ in 0..3 {
        filter.trapline(&["apply", patch]);
        filter.is(ACCEPTED, "[7]");
        filter.is(ACCEPTED + 1, REFUSED);
        filter.trapline(&["revert"]);
        filter.is(ACCEPTED + 1, "[7]");
    }
    assert_eq!(Snapshot::of(filter.child.id()).complaints(&before, Own::Nothing), [""; 0], "left behind");
    // What ends the program without the fix, and does not with it.
    filter.trapline(&["apply", patch]);
    filter.is(FATAL, REFUSED);
    filter.is(ACCEPTED, "[7]");
    filter.trapline(&["revert"]);
    assert_eq!(filter.ask(FATAL), None, "or the fix was none");
}
