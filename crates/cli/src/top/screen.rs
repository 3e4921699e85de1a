//! Figures on a terminal.
//!
//! Owns [`Screen`], which has the terminal while there is something to see, and its loop: look, draw, wait for a key. What keys do is [`app`](super::app)'s. Invariant: the
//! terminal is as it was when the screen is dropped, and when anybody panics.

use std::{
    fs::File,
    io::{self, Write as _},
    panic,
    path::PathBuf,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result};
use ratatui::{
    Terminal,
    backend::CrosstermBackend,
    crossterm::{
        cursor, event, execute,
        terminal::{EnterAlternateScreen, LeaveAlternateScreen, disable_raw_mode, enable_raw_mode},
    },
};
use rustix::{
    event::{PollFd, PollFlags, poll},
    io::Errno,
};

use super::{
    Shared,
    app::{App, Wish},
    batch::to_table,
    model::View,
};

/// How soon it is noticed that all is over.
const AT_LEAST: Duration = Duration::from_millis(50);

/// How long keys are waited for that may be there: crossterm does not look if it has no time.
const MOMENT: Duration = Duration::from_millis(1);

/// Functions of the table that is left behind when the program has ended.
const LEFT_BEHIND: usize = 15;

/// See the module's text.
pub(super) struct Screen {
    terminal: Terminal<CrosstermBackend<File>>,
    tty: File,
    output: PathBuf,
}

impl Screen {
    /// Takes the terminal. What keys record goes to `output`.
    pub(super) fn new(tty: File, output: PathBuf) -> Result<Self> {
        let doing = "taking the terminal";
        let (drawn, at_panic) = (tty.try_clone().context(doing)?, tty.try_clone().context(doing)?);
        let told = panic::take_hook();
        panic::set_hook(Box::new(move |info| {
            give_back(&at_panic);
            told(info);
        }));
        enable_raw_mode().context(doing)?;
        let screen = Self { terminal: Terminal::new(CrosstermBackend::new(drawn)).context(doing)?, tty, output };
        execute!(&screen.tty, EnterAlternateScreen, cursor::Hide).context(doing)?;
        Ok(screen)
    }

    /// Shows figures until all is over.
    pub(super) fn run(mut self, shared: &Shared, view: View, delay: Duration) -> Result<()> {
        let ends = Ends(shared);
        let mut app = App::new(view);
        let mut due = Instant::now();
        let mut is_changed = true;
        while !shared.is_over() {
            if Instant::now() >= due {
                due = Instant::now() + delay;
                is_changed = true;
                app.look(shared.figures.modules(), shared.figures.look());
            }
            while let Some(news) = shared.figures.news() {
                app.tell(news);
                is_changed = true;
            }
            if let Some(order) = app.due_order() {
                shared.figures.order(order);
            }
            if is_changed {
                self.terminal.draw(|frame| app.draw(frame)).context("drawing on the terminal")?;
            }
            let left = due.saturating_duration_since(Instant::now()).min(AT_LEAST);
            if is_gone(&self.tty, left).context("waiting for a key")? {
                shared.end();
                break;
            }
            is_changed = event::poll(MOMENT).context("waiting for a key")?;
            if is_changed {
                match app.take(&event::read().context("reading a key")?, &self.output) {
                    Some(Wish::Leave) => shared.end(),
                    Some(Wish::Order(order)) => shared.figures.order(order),
                    None => {}
                }
            }
        }
        drop(ends);
        let has_left = shared.is_ended.load(std::sync::atomic::Ordering::Relaxed);
        app.look(shared.figures.modules(), shared.figures.look());
        let Self { tty, .. } = &self;
        let mut tty = tty.try_clone().context("keeping the terminal")?;
        drop(self);
        // Who has left has seen enough.
        if !has_left && !shared.has_failed() {
            let rows = app.rows();
            let text = to_table(app.snapshot(), &rows[..rows.len().min(LEFT_BEHIND)]);
            tty.write_all(text.as_bytes()).context("cannot write to the terminal")?;
        }
        Ok(())
    }
}

impl Drop for Screen {
    fn drop(&mut self) {
        give_back(&self.tty);
    }
}

/// Waits for a key, or some time. Returns whether the terminal is closed: crossterm reads its end again and again.
fn is_gone(tty: &File, patience: Duration) -> io::Result<bool> {
    let mut ready = [PollFd::new(tty, PollFlags::IN)];
    match poll(&mut ready, Some(&patience.try_into().map_err(io::Error::other)?)) {
        Ok(_) => Ok(ready[0].revents().intersects(PollFlags::HUP | PollFlags::ERR)),
        // The terminal has another size.
        Err(Errno::INTR) => Ok(false),
        Err(error) => Err(error.into()),
    }
}

/// Has the recorder end, however the loop does.
struct Ends<'a>(&'a Shared);

impl Drop for Ends<'_> {
    fn drop(&mut self) {
        if !self.0.is_over() {
            self.0.end();
        }
    }
}

/// Makes the terminal what it was. Whatever fails, the rest is tried.
fn give_back(mut tty: &File) {
    let _: [io::Result<()>; 2] = [execute!(tty, LeaveAlternateScreen, cursor::Show), disable_raw_mode()];
    let _ = tty.flush();
}
