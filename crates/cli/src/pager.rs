//! What is printed on a terminal goes through a pager.
//!
//! Owns which program that is, and how the command and it end together. Verbs print to standard output as ever: [`Pager::start`] puts a pipe there. Invariant: where
//! standard output is no terminal, nothing is started.

use std::{
    env,
    fs::OpenOptions,
    io::{ErrorKind, IsTerminal as _, stdout},
    process::{Child, Command, Stdio, exit},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread::{self, JoinHandle},
};

use rustix::stdio::dup2_stdout;
use signal_hook::consts::SIGINT;

/// Short texts are printed and left (F), colours are shown (R), and the screen is kept (X).
const LESS: &str = "FRX";

/// A pager that reads what is printed.
pub(crate) struct Pager {
    waiter: JoinHandle<()>,
    /// All is printed: the status is the command's, whenever the pager ends.
    is_printed: Arc<AtomicBool>,
}

impl Pager {
    /// Starts one if standard output is a terminal, and people want one.
    pub(crate) fn start() -> Option<Self> {
        let mut child = stdout().is_terminal().then(spawn)??;
        let pipe = child.stdin.take()?;
        // Interrupts are the pager's, which may stop reading without ending. Without a handler, the shell would have the terminal back beside it.
        signal_hook::flag::register(SIGINT, Arc::default()).ok()?;
        dup2_stdout(&pipe).ok()?;
        let is_printed = Arc::new(AtomicBool::new(false));
        let seen = Arc::clone(&is_printed);
        let waiter = thread::spawn(move || {
            let _ = child.wait();
            // Acquire: pairs with the Release in `end`. A reader that goes away early is no error, and ends the work.
            if !seen.load(Ordering::Acquire) {
                exit(0);
            }
        });
        Some(Self { waiter, is_printed })
    }

    /// Lets it know that nothing follows, and waits until the reader has seen enough.
    pub(crate) fn end(self) {
        self.is_printed.store(true, Ordering::Release);
        if let Ok(nothing) = OpenOptions::new().write(true).open("/dev/null")
            && dup2_stdout(nothing).is_ok()
        {
            let _ = self.waiter.join();
        }
    }
}

fn spawn() -> Option<Child> {
    let wanted = env::var("PAGER").ok();
    let mut words = wanted.as_deref().unwrap_or("less").split_whitespace();
    // An empty PAGER and `cat` are how people say that they want none.
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
            eprintln!("trapline: cannot start the pager {name}: {error}; correct PAGER, or give --no-pager");
            None
        }
    }
}
