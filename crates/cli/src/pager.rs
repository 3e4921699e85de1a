//! What is printed on a terminal goes through a pager.
//!
//! Owns which program that is, and how the command and it end together. `main` says with [`want`] whether there may be one, who prints says [`begin`] before the first
//! text, and `main` says [`end`]. So an error before the first text, and an interrupt, are the command's own. Invariant: where standard output is no
//! terminal, nothing is started; a reader that goes away changes no answer.

use std::{
    env,
    fs::OpenOptions,
    io::{ErrorKind, IsTerminal as _, stdout},
    mem,
    process::{Child, Command, Stdio, exit},
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    thread::{self, JoinHandle},
};

use rustix::stdio::dup2_stdout;
use signal_hook::consts::SIGINT;

/// Short texts are printed and left (F), colours are shown (R), and the screen is kept (X).
const LESS: &str = "FRX";

/// Standard output is one for the whole command, and so is what reads it.
static PAGER: Mutex<State> = Mutex::new(State::Unwanted);

enum State {
    Unwanted,
    /// This one, or else the usual one.
    Wanted(Option<String>),
    Running(Pager),
}

/// A pager that reads what is printed.
struct Pager {
    waiter: JoinHandle<()>,
    /// All is printed: the status is the command's, whenever the pager ends.
    is_printed: Arc<AtomicBool>,
}

/// How what is printed comes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Text {
    /// Whole, when the work is done.
    Whole,
    /// While the work goes on, which has no end but to be read.
    Stream,
}

/// What is printed may go through a pager: this one, or else the usual one.
pub(crate) fn want(program: Option<String>) {
    *PAGER.lock().unwrap_or_else(PoisonError::into_inner) = State::Wanted(program);
}

/// Starts one, before the first text, if it is wanted and standard output is a terminal.
pub(crate) fn begin(text: Text) {
    let mut state = PAGER.lock().unwrap_or_else(PoisonError::into_inner);
    if let State::Wanted(program) = &*state {
        *state = Pager::start(program.as_deref(), text).map_or(State::Unwanted, State::Running);
    }
}

/// Lets it know that nothing follows, and waits until the reader has seen enough.
pub(crate) fn end() {
    let state = mem::replace(&mut *PAGER.lock().unwrap_or_else(PoisonError::into_inner), State::Unwanted);
    if let State::Running(pager) = state {
        pager.end();
    }
}

impl Pager {
    fn start(program: Option<&str>, text: Text) -> Option<Self> {
        let mut child = stdout().is_terminal().then(|| spawn(program))??;
        let pipe = child.stdin.take()?;
        // Interrupts are the pager's, which may stop reading without ending. Without a handler, the shell would have the terminal back beside it.
        signal_hook::flag::register(SIGINT, Arc::default()).ok()?;
        dup2_stdout(&pipe).ok()?;
        let is_printed = Arc::new(AtomicBool::new(false));
        let seen = Arc::clone(&is_printed);
        let waiter = thread::spawn(move || {
            let _ = child.wait();
            // Acquire: pairs with the Release in `end`. Nobody reads any more, so a stream ends here, which may have nothing to print for long; a whole text has its answer.
            if text == Text::Stream && !seen.load(Ordering::Acquire) {
                exit(0);
            }
        });
        Some(Self { waiter, is_printed })
    }

    fn end(self) {
        self.is_printed.store(true, Ordering::Release);
        if let Ok(nothing) = OpenOptions::new().write(true).open("/dev/null")
            && dup2_stdout(nothing).is_ok()
        {
            let _ = self.waiter.join();
        }
    }
}

fn spawn(wanted: Option<&str>) -> Option<Child> {
    let mut words = wanted.unwrap_or("less").split_whitespace();
    // An empty one and `cat` are how people say that they want none.
    let name = words.next().filter(|name| *name != "cat")?;
    let mut command = Command::new(name);
    command.args(words).stdin(Stdio::piped());
    if env::var_os("LESS").is_none() {
        command.env("LESS", LESS);
    }
    match command.spawn() {
        Ok(child) => Some(child),
        Err(error) if wanted.is_none() && error.kind() == ErrorKind::NotFound => None,
        Err(error) => {
            eprintln!(
                "trapline: cannot start the pager {name}: {error}; correct PAGER or the configuration, or give --no-pager"
            );
            None
        }
    }
}
