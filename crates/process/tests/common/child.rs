//! A test in a process of its own.
//!
//! A process has one tracer, and the tests write text and install signal handlers: so each body runs in a child, which is this test program
//! again with one test selected. The parent bounds its time, judges how it ended, and removes the directory that the child had for its files.
//! Invariant: no process and no file is left behind, however the child ends.

use std::{
    env,
    ffi::OsStr,
    fmt,
    io::{self, Read},
    os::unix::process::{CommandExt, ExitStatusExt},
    panic,
    process::{Command, ExitStatus, Stdio},
    sync::mpsc,
    thread,
    time::Duration,
};

use super::support::Directory;

/// Names the test that a process was started for.
const VARIABLE: &str = "TRAPLINE_TEST_IN_CHILD";

/// Far more than any test needs, for machines that do other things too. Beyond it the child is killed, and the test fails.
const TIME_LIMIT: Duration = Duration::from_mins(2);

/// How long threads may take to leave a place, on such a machine.
pub(crate) const PATIENCE: Duration = Duration::from_secs(30);

/// What a child prints at the end of its body: a name that selects no test would end well too.
const FINISHED: &str = "the body has run to its end";
/// What a child prints that expects to die.
const LAST_WORDS: &str = "these are the last words";

/// How a child ended, and what it printed.
#[derive(Debug)]
pub(crate) struct End {
    status: ExitStatus,
    output: String,
}

impl fmt::Display for End {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}\n{}", self.status, self.output)
    }
}

/// Runs `body` in a child, where it must return. `name` is the test's, with its modules.
pub(crate) fn in_child(name: &str, body: impl FnOnce()) {
    if let Some(end) = run_or_be(name, body) {
        assert!(end.status.success() && end.output.contains(FINISHED), "{end}");
    }
}

/// Runs `body` in a child, where it must be killed by `signal` after [`say_last_words`].
pub(crate) fn in_child_killed_by(signal: i32, name: &str, body: impl FnOnce()) {
    if let Some(end) = run_or_be(name, body) {
        assert_eq!(end.status.signal(), Some(signal), "{end}");
        assert!(end.output.contains(LAST_WORDS) && !end.output.contains(FINISHED), "{end}");
    }
}

/// Says that what follows ends this process.
pub(crate) fn say_last_words() {
    println!("{LAST_WORDS}");
}

/// In the parent the end of the child; in the child nothing, when the body is done.
fn run_or_be(name: &str, body: impl FnOnce()) -> Option<End> {
    if env::var_os(VARIABLE).as_deref() != Some(OsStr::new(name)) {
        return Some(run(name));
    }
    end_with_parent();
    end_with_any_thread();
    body();
    println!("{FINISHED}");
    None
}

fn run(name: &str) -> End {
    // Temporary files of the child, and of the compilers that it runs, go there.
    let directory = Directory::new();
    let (mut reader, writer) = io::pipe().expect("a pipe");
    let mut command = Command::new(env::current_exe().expect("this program's own path"));
    command
        .args([name, "--exact", "--include-ignored", "--nocapture", "--test-threads=1"])
        .env(VARIABLE, name)
        .env("TMPDIR", directory.path(""))
        .env_remove("RUST_BACKTRACE")
        .stdin(Stdio::null())
        .stdout(writer.try_clone().expect("a descriptor"))
        .stderr(writer)
        .process_group(0);
    let mut child = command.spawn().expect("starting this program again");
    drop(command);

    let (send, receive) = mpsc::channel();
    thread::spawn(move || {
        let mut output = Vec::new();
        let _ = reader.read_to_end(&mut output);
        let _ = send.send(String::from_utf8_lossy(&output).into_owned());
    });
    // The pipe ends with the last process that holds it: the child, and whatever it forked.
    let output = receive.recv_timeout(TIME_LIMIT).unwrap_or_else(|_| {
        kill_group(child.id());
        let so_far = receive.recv_timeout(PATIENCE).unwrap_or_default();
        format!("{so_far}\nkilled after {TIME_LIMIT:?}")
    });
    End { status: child.wait().expect("own child"), output }
}

/// Kills a child, which was started as the leader of a process group, with all that it forked.
fn kill_group(leader: u32) {
    // SAFETY: signals to others have no memory effects here. The leader has not been waited for, so the number is still its.
    unsafe { libc::kill(-leader.cast_signed(), libc::SIGKILL) };
}

/// Has the kernel kill this process when the thread that waits for it ends.
fn end_with_parent() {
    // SAFETY: this operation takes a number.
    let result = unsafe { libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) };
    assert_eq!(result, 0);
    let no_core = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: the limit is a live local. Some children are meant to die, and need not leave a core file.
    let result = unsafe { libc::setrlimit(libc::RLIMIT_CORE, &raw const no_core) };
    assert_eq!(result, 0);
}

/// Ends the process with the first panic, in whichever thread: the others would wait for that thread.
fn end_with_any_thread() {
    let print = panic::take_hook();
    panic::set_hook(Box::new(move |info| {
        print(info);
        // SAFETY: ends the process at once; nothing that would be skipped is needed.
        unsafe { libc::_exit(101) };
    }));
}

/// Lets others run until `condition` holds. The time limit of the child bounds it.
pub(crate) fn wait_until(mut condition: impl FnMut() -> bool) {
    while !condition() {
        thread::yield_now();
    }
}
