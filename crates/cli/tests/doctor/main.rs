//! `trapline doctor`: each thing that is in the way is made, told by it, and told by `trapline record -p` in the same words; and what is not in the way, is not.

// The recorder is a 64-bit program.
#![cfg(target_arch = "x86_64")]

#[path = "../common/mod.rs"]
mod common;

use std::{
    fs,
    io::{BufRead, BufReader},
    os::unix::{fs::MetadataExt, fs::PermissionsExt, process::CommandExt},
    path::PathBuf,
    process::{Child, Command, Output, Stdio},
    thread,
    time::{Duration, Instant},
};

use common::Directory;
use serde_json::Value;

const PATIENCE: Duration = Duration::from_mins(2);

const NOBODY: [&str; 4] = ["/usr/bin/setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"];

/// A process that ends with this value, and everything that it has started.
struct Guest(Child);

impl Guest {
    fn start(directory: &Directory, words: &[&str]) -> Self {
        let mut command = Command::new(words[0]);
        command.args(&words[1..]).current_dir(&directory.0).process_group(0);
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::null());
        Self(command.spawn().unwrap_or_else(|error| panic!("starting {words:?}: {error}")))
    }

    /// One that says when it is what it is to be.
    fn ready(directory: &Directory, words: &[&str]) -> Self {
        let mut guest = Self::start(directory, words);
        let mut line = String::new();
        let output = guest.0.stdout.take().expect("it is piped");
        BufReader::new(output).read_line(&mut line).expect("it says something");
        assert_eq!(line, "ready\n", "{words:?}");
        until("it sleeps", || state(guest.pid()).starts_with('S'));
        guest
    }

    fn sleep(directory: &Directory) -> Self {
        let guest = Self::start(directory, &["/usr/bin/sleep", "1000"]);
        until("sleep", || state(guest.pid()).starts_with('S') && name(guest.pid()) == "sleep");
        guest
    }

    fn pid(&self) -> u32 {
        self.0.id()
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        signal("KILL", &format!("-{}", self.pid()));
        let _ = self.0.wait();
    }
}

fn signal(name: &str, whom: &str) {
    let _ = Command::new("/bin/kill").args(["-s", name, "--", whom]).stderr(Stdio::null()).status();
}

fn until(what: &str, is_so: impl Fn() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !is_so() {
        assert!(Instant::now() < deadline, "waited for: {what}");
        thread::sleep(Duration::from_millis(2));
    }
}

fn field(pid: u32, name: &str) -> String {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    status.lines().find_map(|line| line.strip_prefix(name)).unwrap_or_default().trim().to_owned()
}

fn state(pid: u32) -> String {
    field(pid, "State:")
}

fn name(pid: u32) -> String {
    field(pid, "Name:")
}

fn is_root() -> bool {
    let is_root = fs::metadata("/proc/self").is_ok_and(|process| process.uid() == 0);
    leave_out_unless(is_root, "only root can try this");
    is_root
}

fn leave_out_unless(is_possible: bool, why: &str) {
    assert!(is_possible || std::env::var_os("CI").is_none(), "CI has to try this: {why}");
    if !is_possible {
        eprintln!("left out: {why}");
    }
}

/// Compiles the guest.
fn guest(directory: &Directory, flags: &[&str]) -> Option<String> {
    let source = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/doctor/guest.c");
    let program = directory.0.join("guest");
    let status = Command::new("cc").args(["-O1", "-o"]).arg(&program).args(flags).arg(source).status();
    let program = program.to_str().expect("a plain name").to_owned();
    status.expect("a C compiler").success().then_some(program)
}

fn ask(output: &Output) -> Value {
    let text = String::from_utf8_lossy(&output.stdout);
    let answer: Value = serde_json::from_str(&text)
        .unwrap_or_else(|error| panic!("{error}: {text}{}", String::from_utf8_lossy(&output.stderr)));
    assert_eq!(output.status.code(), Some(i32::from(answer["can_record"] != true)), "{text}");
    answer
}

fn doctor(directory: &Directory, pid: u32) -> Value {
    ask(&directory.trapline(&["doctor", "--json", "-p", &pid.to_string()]))
}

fn refusals(answer: &Value) -> Vec<&str> {
    let refusals = answer["process"]["refusals"].as_array().expect("a list");
    refusals.iter().filter_map(|refusal| refusal["name"].as_str()).collect()
}

/// A process that nothing is wrong with.
fn check_fine(directory: &Directory, pid: u32) {
    let answer = doctor(directory, pid);
    assert_eq!(refusals(&answer), Vec::<&str>::new(), "{answer}");
    assert_eq!(answer["can_record"], true);
    let told = directory.text(&["doctor", "-p", &pid.to_string()]);
    assert!(told.contains("can be recorded"), "{told}");
}

/// A process that can be recorded, and is.
fn check_recorded(directory: &Directory, pid: u32) {
    check_fine(directory, pid);
    let output = directory.trapline(&["record", "-o", "trace", "--duration", "0.1", "-p", &pid.to_string()]);
    let told = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success() && told.contains("of 1 process"), "{told}");
    assert_eq!(field(pid, "TracerPid:"), "0");
    let maps = fs::read_to_string(format!("/proc/{pid}/maps")).expect("it runs on");
    assert!(!maps.contains("memfd:trapline"), "{maps}");
}

/// What is in the way of a process, first of all `name`, is told with these words, by `record` as well, and leaves it in the state that it was in.
fn check(directory: &Directory, pid: u32, name: &str, words: &[&str]) {
    // A tracer that comes wakes who sleeps.
    let kind = || state(pid).replace("R (running)", "S (sleeping)");
    let before = kind();
    let answer = doctor(directory, pid);
    assert_eq!(refusals(&answer).first(), Some(&name), "{answer}");
    let text = answer["process"]["refusals"][0]["text"].as_str().expect("a text").to_owned();
    for word in words {
        assert!(text.contains(word), "`{word}` is not in: {text}");
    }
    let output = directory.trapline(&["doctor", "-p", &pid.to_string()]);
    assert!(String::from_utf8_lossy(&output.stdout).contains(&text));
    let output = directory.trapline(&["record", "-o", "trace", "--duration", "0.1", "-p", &pid.to_string()]);
    let told = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.code() == Some(2) && told.contains(&text), "{text}\nand record: {told}");
    assert!(!directory.0.join("trace").exists(), "a trace of nothing");
    assert_eq!(kind(), before);
}

#[test]
fn an_ordinary_process_and_machine_are_fine() {
    let directory = Directory::new("doctor-fine");
    check_fine(&directory, Guest::sleep(&directory).pid());
    let answer = ask(&directory.trapline(&["doctor", "--json"]));
    assert!(answer["can_record"] == true && answer["process"].is_null(), "{answer}");
    let told = directory.text(&["doctor"]);
    for finding in answer["machine"].as_array().expect("a list") {
        assert!(told.contains(finding["text"].as_str().expect("a text")), "{finding}");
    }
    assert!(told.contains("Programs can be recorded here"), "{told}");
}

#[test]
fn who_is_no_process() {
    let directory = Directory::new("doctor-none");
    let gone = Guest::sleep(&directory).pid();
    check(&directory, gone, "no-such-process", &["pgrep"]);
    let own = std::process::id();
    std::thread::scope(|scope| {
        let (is_checked, until_checked) = std::sync::mpsc::channel::<()>();
        let (tell, told) = std::sync::mpsc::channel();
        scope.spawn(move || {
            let link = fs::read_link("/proc/thread-self").expect("ourselves");
            let tid = link.file_name().and_then(|name| name.to_str()?.parse().ok());
            tell.send(tid.expect("a number")).expect("somebody listens");
            // Until the other end is dropped.
            let _ = until_checked.recv();
        });
        check(&directory, told.recv().expect("a number"), "thread", &[&own.to_string(), "give that number"]);
        drop(is_checked);
    });
    let has_kernel_threads = name(2) == "kthreadd";
    leave_out_unless(has_kernel_threads, "the kernel's threads are not to be seen here");
    if has_kernel_threads {
        check(&directory, 2, "kernel-thread", &["of the kernel"]);
    }
}

#[test]
fn a_zombie() {
    let directory = Directory::new("doctor-zombie");
    let guest = Guest::start(&directory, &["/usr/bin/true"]);
    until("its end", || state(guest.pid()).starts_with('Z'));
    check(&directory, guest.pid(), "zombie", &["ended already"]);
}

#[test]
fn a_stopped_process_until_it_goes_on() {
    let directory = Directory::new("doctor-stopped");
    let guest = Guest::sleep(&directory);
    signal("STOP", &guest.pid().to_string());
    until("a stop", || state(guest.pid()).starts_with('T'));
    check(&directory, guest.pid(), "stopped", &["kill -CONT"]);
    signal("CONT", &guest.pid().to_string());
    until("the end of the stop", || state(guest.pid()).starts_with('S'));
    check_fine(&directory, guest.pid());
}

#[test]
fn a_process_under_a_debugger_until_that_ends() {
    let directory = Directory::new("doctor-traced");
    let guest = Guest::sleep(&directory);
    for debugger in [&["/usr/bin/gdb", "-nx", "-q", "-p"][..], &["/usr/bin/strace", "-o", "/dev/null", "-p"]] {
        let pid = guest.pid().to_string();
        let tracer = Guest::start(&directory, &[debugger, &[&pid]].concat());
        until("a tracer", || field(guest.pid(), "TracerPid:") == tracer.pid().to_string());
        let name = debugger[0].trim_start_matches("/usr/bin/");
        // A debugger stops it meanwhile, and that is not for us to say; strace does for a moment.
        let as_it_stays = if name == "gdb" { 't' } else { 'S' };
        until("its state", || state(guest.pid()).starts_with(as_it_stays));
        check(&directory, guest.pid(), "traced", &[&format!("({name})"), &tracer.pid().to_string()]);
        assert_eq!(refusals(&doctor(&directory, guest.pid())), ["traced"]);
        signal("TERM", &tracer.pid().to_string());
        drop(tracer);
        until("no tracer", || field(guest.pid(), "TracerPid:") == "0");
        until("it goes on", || state(guest.pid()).starts_with('S'));
        check_fine(&directory, guest.pid());
    }
}

#[test]
fn programs_that_are_built_in_another_way() {
    for (flags, name, words) in [
        (&["-static"][..], "static", "link it dynamically"),
        (&["-m32", "-static"], "static", "link it dynamically"),
        (&["-DLIKE_GO"], "go", "Go program"),
    ] {
        let directory = Directory::new(&format!("doctor-{name}"));
        let program = guest(&directory, flags);
        leave_out_unless(program.is_some(), "there is no 32-bit compiler");
        if let Some(program) = program {
            check(&directory, Guest::ready(&directory, &[&program]).pid(), name, &[words]);
        }
    }
}

#[test]
fn a_sandbox() {
    let directory = Directory::new("doctor-seccomp");
    let program = guest(&directory, &[]).expect("a program");
    let getrandom = "318";
    let guest = Guest::ready(&directory, &[&program, "forbid", getrandom]);
    check(&directory, guest.pid(), "seccomp", &["launch it by `trapline record`"]);
}

#[test]
fn who_forbids_itself_new_code_is_recorded() {
    let directory = Directory::new("doctor-mdwe");
    let program = guest(&directory, &[]).expect("a program");
    let guest = Guest::ready(&directory, &[&program, "no-new-code"]);
    check_fine(&directory, guest.pid());
    let recorded = ["record", "-o", "trace", "--duration", "0.1", "-p", &guest.pid().to_string()];
    let output = directory.trapline(&recorded);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    assert!(directory.0.join("trace").exists() && state(guest.pid()).starts_with('S'));
}

/// A folder with a copy of the command, that everybody may write to.
fn open_to_all(name: &str) -> (Directory, PathBuf) {
    let directory = Directory::new(name);
    fs::set_permissions(&directory.0, fs::Permissions::from_mode(0o777)).expect("a folder of our own");
    let copy = directory.0.join("trapline");
    fs::copy(env!("CARGO_BIN_EXE_trapline"), &copy).expect("a copy of the command");
    (directory, copy)
}

/// What nobody is told of a process.
fn as_nobody(copy: &PathBuf, pid: u32) -> Value {
    let mut command = Command::new(NOBODY[0]);
    command.args(&NOBODY[1..]).arg(copy).args(["doctor", "--json", "-p", &pid.to_string()]);
    ask(&command.output().expect("setpriv"))
}

#[test]
fn other_users() {
    if !is_root() {
        return;
    }
    let (directory, copy) = open_to_all("doctor-users");
    let ours = Guest::sleep(&directory);
    let answer = as_nobody(&copy, ours.pid());
    assert_eq!(refusals(&answer), ["other-user"]);
    assert!(answer["process"]["refusals"][0]["text"].as_str().expect("a text").contains("sudo -u '#0'"), "{answer}");
    // Without secrets it is fine, with secrets it is not.
    let program = guest(&directory, &[]).expect("a program");
    let open = Guest::ready(&directory, &[&NOBODY[..], &[&program]].concat());
    assert_eq!(refusals(&as_nobody(&copy, open.pid())), Vec::<&str>::new());
    check_recorded(&directory, open.pid());
    let secret = Guest::ready(&directory, &[&NOBODY[..], &[&program, "secret"]].concat());
    assert_eq!(refusals(&as_nobody(&copy, secret.pid())), ["not-dumpable"]);
}

#[test]
fn a_setuid_program() {
    if !is_root() {
        return;
    }
    let (directory, copy) = open_to_all("doctor-setuid");
    let program = guest(&directory, &[]).expect("a program");
    fs::set_permissions(&program, fs::Permissions::from_mode(0o4755)).expect("a file of our own");
    let guest = Guest::ready(&directory, &[&NOBODY[..], &[&program]].concat());
    let answer = as_nobody(&copy, guest.pid());
    assert_eq!(refusals(&answer).first(), Some(&"setuid"), "{answer}");
    let text = answer["process"]["refusals"][0]["text"].as_str().expect("a text");
    assert!(text.contains("user 65534 started it") && text.contains("rights of user 0"), "{text}");
    check_recorded(&directory, guest.pid());
}

#[test]
fn other_namespaces() {
    if !is_root() {
        return;
    }
    let (directory, copy) = open_to_all("doctor-namespace");
    let program = guest(&directory, &[]).expect("a program");
    let unshared = Guest::ready(&directory, &[&["/usr/bin/unshare", "--mount"], &NOBODY[..], &[&program]].concat());
    assert!(refusals(&as_nobody(&copy, unshared.pid())).contains(&"other-namespace"));
    check_recorded(&directory, unshared.pid());
    // Its number is another one inside, and neither it nor the files of our processes can be seen there.
    let words = ["/usr/bin/unshare", "--mount", "--pid", "--net", "--fork", "--mount-proc", "--kill-child", &program];
    let container = Guest::ready(&directory, &words);
    let children = fs::read_to_string(format!("/proc/{0}/task/{0}/children", container.pid())).expect("a list");
    let inside = children.trim().parse().expect("one child");
    assert_eq!(field(inside, "NSpid:").split_whitespace().last(), Some("1"));
    check_recorded(&directory, inside);
}

#[test]
fn processes_that_end_meanwhile() {
    let directory = Directory::new("doctor-ends");
    for round in 0..20 {
        let guest = Guest::start(&directory, &["/usr/bin/sleep", &format!("0.0{round:02}")]);
        let answer = doctor(&directory, guest.pid());
        let is_told = |name: &&str| ["zombie", "ended"].contains(name);
        assert!(refusals(&answer).iter().all(is_told), "{answer}");
    }
}

#[test]
fn a_machine_where_it_is_forbidden() {
    let directory = Directory::new("doctor-machine");
    let program = guest(&directory, &[]).expect("a program");
    let sleeper = Guest::sleep(&directory);
    let told = |number: &str| {
        let mut command = Command::new(&program);
        command.args(["forbid", number, env!("CARGO_BIN_EXE_trapline"), "doctor", "--json"]);
        ask(&command.args(["-p", &sleeper.pid().to_string()]).output().expect("the guest"))
    };
    let prevents = |answer: &Value| -> Vec<String> {
        let findings = answer["machine"].as_array().expect("a list").iter();
        let names = findings.filter(|finding| finding["level"] == "prevents").map(|finding| &finding["name"]);
        names.filter_map(Value::as_str).map(str::to_owned).collect()
    };
    let (ptrace, memfd_create, getrandom) = ("101", "319", "318");
    assert_eq!(prevents(&told(ptrace)), ["ptrace"]);
    assert_eq!(prevents(&told(memfd_create)), ["shared-memory"]);
    let harmless = told(getrandom);
    assert!(prevents(&harmless).is_empty() && harmless["can_record"] == true, "{harmless}");
    let findings = harmless["machine"].as_array().expect("a list");
    assert!(findings.iter().any(|finding| finding["name"] == "sandbox" && finding["level"] == "limits"));
}
