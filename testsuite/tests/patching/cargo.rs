//! Patches of Cargo's projects, built by Cargo.

use std::{
    env, fs,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::{
        Mutex,
        atomic::{AtomicBool, AtomicU64, Ordering::Relaxed},
    },
    thread,
};

use trapline_testsuite::{run, scratch::Scratch, snapshot, trapline, web};

use crate::target::trapline_of;

/// Has Cargo build the release of a project.
fn built(project: &Path, name: &str) -> PathBuf {
    let cargo = env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let mut command = Command::new(cargo);
    command.args(["build", "--quiet", "--release", "--target-dir", "target"]).current_dir(project);
    let output = command.output().expect("cargo starts");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    project.join("target/release").join(name)
}

/// What `trapline patch build --cargo` says of two folders, and whether it has built a patch.
fn patched(old: &Path, new: &Path, target: &Path, patch: &Path) -> (bool, String) {
    let mut command = Command::new(trapline::path());
    command.args(["patch", "build", "--cargo"]).args([old, new]).arg("--target").arg(target).arg("-o").arg(patch);
    let output = command.output().expect("a command that starts");
    let text = [output.stdout, output.stderr].map(|bytes| String::from_utf8_lossy(&bytes).into_owned()).concat();
    (output.status.success(), text)
}

/// Writes a file, unless it is what it should be: then Cargo has nothing to build.
fn write(path: &Path, text: &str) {
    if fs::read_to_string(path).is_ok_and(|there| there == text) {
        return;
    }
    fs::create_dir_all(path.parent().expect("a folder of its own")).expect("a folder of our own");
    fs::write(path, text).expect("a folder of our own");
}

/// A workspace of a program and a library of its own.
fn workspace(folder: &Path, edit: impl Fn(&str) -> String) {
    const FILES: [(&str, &str); 5] = [
        (
            "Cargo.toml",
            "[workspace]\nmembers = [\"program\", \"words\"]\nresolver = \"3\"\n[profile.release]\ncodegen-units = 1\n",
        ),
        (
            "program/Cargo.toml",
            "[package]\nname = \"program\"\nversion = \"0.1.0\"\nedition = \"2024\"\n[dependencies]\nwords = { path = \"../words\" }\n",
        ),
        ("words/Cargo.toml", "[package]\nname = \"words\"\nversion = \"0.1.0\"\nedition = \"2024\"\n"),
        (
            "program/src/main.rs",
            "use std::{io::stdin, sync::atomic::{AtomicU64, Ordering::Relaxed}};
static LINES: AtomicU64 = AtomicU64::new(0);
fn main() {
    for line in stdin().lines() {
        let count = LINES.fetch_add(1, Relaxed);
        println!(\"{count} {}\", words::greeting(&line.expect(\"text\")));
    }
}
",
        ),
        (
            "words/src/lib.rs",
            "thread_local! { static LAST: std::cell::RefCell<String> = const { std::cell::RefCell::new(String::new()) }; }
pub fn greeting(name: &str) -> String {
    let last = LAST.replace(name.to_owned());
    format!(\"hello {name} after {last:?}\")
}
",
        ),
    ];
    for (name, text) in FILES {
        write(&folder.join(name), &edit(text));
    }
}

#[test]
fn a_library_of_a_project_is_patched() {
    use std::io::{BufRead, BufReader, Write};
    let scratch = Scratch::new();
    let (old, new) = (scratch.join("old"), scratch.join("new"));
    workspace(&old, str::to_owned);
    workspace(&new, |text| text.replace("format!(\"hello {name}", "format!(\"good morning {name}"));
    let target = built(&old, "program");
    let patch = scratch.join("fix.tlp");
    let (is_built, told) = patched(&old, &new, &target, &patch);
    assert!(is_built && told.contains("patch      program"), "{told}");
    let replaced: Vec<&str> = told.lines().filter(|line| line.starts_with("replaces")).collect();
    assert!(matches!(replaced[..], [only] if only.contains("greeting")), "{told}");
    assert!(!told.contains("other code than the old object"), "{told}");

    let mut child = Command::new(&target).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().expect("it starts");
    let (mut input, output) = (child.stdin.take().expect("a pipe"), child.stdout.take().expect("a pipe"));
    let mut lines = BufReader::new(output).lines();
    let mut ask = |name: &str| {
        writeln!(input, "{name}").expect("a program that listens");
        lines.next().expect("an answer").expect("text")
    };
    let apply = || {
        let outcome = trapline_of(child.id(), &["apply", patch.to_str().expect("a path"), "--deadline", "60"]);
        assert!(outcome.is_good(), "{}", outcome.error);
    };
    assert_eq!(ask("a"), "0 hello a after \"\"");
    apply();
    assert_eq!(ask("b"), "1 good morning b after \"a\"", "its variables have their values");
    let outcome = trapline_of(child.id(), &["revert", "program", "--deadline", "60"]);
    assert!(outcome.is_good(), "{}", outcome.error);
    assert_eq!(ask("c"), "2 hello c after \"b\"");
    drop(input);
    assert!(child.wait().expect("its status").success());
}

#[test]
fn what_changes_the_names_of_functions_is_refused_in_a_sentence() {
    let scratch = Scratch::new();
    let old = scratch.join("old");
    workspace(&old, str::to_owned);
    let target = built(&old, "program");
    let patch = scratch.join("fix.tlp");
    let refused = |name: &str, edit: fn(&str) -> String, words: &str| {
        let new = scratch.join(name);
        workspace(&new, edit);
        let (is_built, told) = patched(&old, &new, &target, &patch);
        assert!(!is_built && told.contains(words) && !patch.exists(), "{told}");
    };
    refused("version", |text| text.replace("0.1.0", "0.1.1"), "the version of");
    refused("units", |text| text.replace("codegen-units = 1\n", ""), "set `codegen-units = 1` in the profile");
    refused(
        "whole",
        |text| format!("{text}{}", if text.contains("[profile") { "lto = true\n" } else { "" }),
        "`lto = false`",
    );
    refused("same", str::to_owned, "there is nothing to patch");
}

/// The web server, killed with this value.
struct Server(Child);

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Answers to all numbers are what they are of one version or the other; after a change they are the new one's. The count of requests goes on.
#[test]
#[ignore = "builds a web server of crates three times, which takes minutes for the first time"]
fn a_handler_of_a_web_server_is_replaced_while_it_serves() {
    const CLIENTS: u64 = 4;
    let fixture = Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/axum");
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join("axum");
    let (old, new) = (folder.join("old"), folder.join("new"));
    for file in ["Cargo.toml", "Cargo.lock", "src/main.rs"] {
        let text = fs::read_to_string(fixture.join(file)).expect("the fixture");
        write(&old.join(file), &text);
        write(&new.join(file), &text.replace("asked.number + asked.number", "asked.number * 3"));
    }
    let target = built(&old, "doubles");
    let scratch = Scratch::new();
    let patch = scratch.join("fix.tlp");
    let (is_built, told) = patched(&old, &new, &target, &patch);
    assert!(is_built, "{told}");
    let mut command = Command::new(&target);
    let server = Server(command.current_dir(scratch.path()).spawn().expect("it starts"));
    run::wait_for(&scratch.join("port"));
    let port: u16 = fs::read_to_string(scratch.join("port")).expect("its port").parse().expect("a number");
    let ask = |number: u64| {
        let answer = String::from_utf8(web::get(port, &format!("/double?number={number}"))).expect("text");
        let (result, count) = answer.trim().split_once(' ').expect("two numbers");
        (result.parse::<u64>().expect("a number"), count.parse::<u64>().expect("a number"))
    };
    let before = snapshot::Snapshot::of(server.0.id());
    let (is_over, asked, counts) = (AtomicBool::new(false), AtomicU64::new(0), Mutex::new(Vec::new()));
    thread::scope(|scope| {
        for client in 0..CLIENTS {
            let (is_over, asked, counts) = (&is_over, &asked, &counts);
            scope.spawn(move || {
                let mut seen = Vec::new();
                // Relaxed: that it is seen at some time is enough.
                for number in (1 + client..).step_by(4).take_while(|_| !is_over.load(Relaxed)) {
                    let (result, count) = ask(number);
                    assert!(result == number * 2 || result == number * 3, "{number}: {result}");
                    seen.push(count);
                    asked.fetch_add(1, Relaxed);
                }
                counts.lock().expect("nobody failed").extend(seen);
            });
        }
        let back_and_forth = || {
            for _ in 0..crate::rounds() {
                for (words, factor) in [(["apply", patch.to_str().expect("a path")], 3), (["revert", "doubles"], 2)] {
                    let outcome = trapline_of(server.0.id(), &[&words[..], &["--deadline", "60"]].concat());
                    assert!(outcome.is_good(), "{}", outcome.error);
                    let (result, count) = ask(7);
                    assert_eq!(result, 7 * factor);
                    counts.lock().expect("nobody failed").push(count);
                }
                let before = asked.load(Relaxed);
                run::wait_until(&"requests", || asked.load(Relaxed) > before + 50);
            }
        };
        let done = std::panic::catch_unwind(std::panic::AssertUnwindSafe(back_and_forth));
        is_over.store(true, Relaxed);
        done.unwrap_or_else(|panic| std::panic::resume_unwind(panic));
    });
    let mut counts = counts.into_inner().expect("nobody failed");
    counts.sort_unstable();
    let every = 1..=counts.len() as u64;
    assert!(counts.iter().copied().eq(every), "a request was not served once");
    println!("{} requests, of which none failed", counts.len());
    let mut complaints = snapshot::Snapshot::of(server.0.id()).complaints(&before, snapshot::Own::Nothing);
    // Its threads come and go with the load.
    complaints.retain(|complaint| !complaint.contains("thread"));
    assert_eq!(complaints, [""; 0], "left behind");
}
