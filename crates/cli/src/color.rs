//! Whether what people read has colours, and which.
//!
//! Owns the decision, which `main` takes once by [`choose`], and the few [`Style`]s that there are; a style that is not wanted writes nothing. `anstream` knows what terminals can, and what
//! `NO_COLOR`, `CLICOLOR` and `CLICOLOR_FORCE` ask for. Invariant: JSON never has colours, nor what is told beside it.

use std::{
    io::{stderr, stdout},
    sync::atomic::{AtomicBool, Ordering},
};

use anstream::AutoStream;
use clap::{
    ColorChoice, ValueEnum as _,
    builder::styling::{AnsiColor, Style},
};

// Relaxed: written once, before there are other threads.
static IN_OUTPUT: AtomicBool = AtomicBool::new(false);
static IN_MESSAGES: AtomicBool = AtomicBool::new(false);

/// What the words of a command line say that may be wrong, for what is told of it.
pub(crate) fn asked_for<'a>(words: impl Iterator<Item = &'a str>) -> Option<ColorChoice> {
    let (mut asked, mut is_next) = (None, false);
    for word in words.take_while(|word| *word != "--") {
        let value = if is_next { Some(word) } else { word.strip_prefix("--color=") };
        asked = value.and_then(|value| ColorChoice::from_str(value, false).ok()).or(asked);
        is_next = !is_next && word == "--color";
    }
    asked
}

/// Decides for both streams.
pub(crate) fn choose(choice: ColorChoice) {
    let decide = |by_itself: anstream::ColorChoice| match choice {
        ColorChoice::Auto => by_itself != anstream::ColorChoice::Never,
        ColorChoice::Always => true,
        ColorChoice::Never => false,
    };
    IN_OUTPUT.store(decide(AutoStream::choice(&stdout())), Ordering::Relaxed);
    IN_MESSAGES.store(decide(AutoStream::choice(&stderr())), Ordering::Relaxed);
}

/// Whether standard output has colours.
#[cfg(target_arch = "x86_64")]
pub(crate) fn has_output() -> bool {
    IN_OUTPUT.load(Ordering::Relaxed)
}

/// Of a line above others, on standard output.
pub(crate) fn heading() -> Style {
    wanted(&IN_OUTPUT, Style::new().bold())
}

/// Of what is missing, on standard output.
pub(crate) fn missing() -> Style {
    wanted(&IN_OUTPUT, AnsiColor::Yellow.on_default())
}

/// Of a warning's first word, on standard error.
pub(crate) fn warning() -> Style {
    wanted(&IN_MESSAGES, AnsiColor::Yellow.on_default().bold())
}

/// Of an error's first word, on standard error.
pub(crate) fn error() -> Style {
    wanted(&IN_MESSAGES, AnsiColor::Red.on_default().bold())
}

fn wanted(is_wanted: &AtomicBool, style: Style) -> Style {
    if is_wanted.load(Ordering::Relaxed) { style } else { Style::new() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_word_on_colours_counts_and_those_of_a_program_do_not() {
        let of = |line: &str| asked_for(line.split(' '));
        assert_eq!(of("report --color never"), Some(ColorChoice::Never));
        assert_eq!(of("--color=never report --color always"), Some(ColorChoice::Always));
        assert_eq!(of("report --color nonsense"), None);
        assert_eq!(of("record -- ls --color never"), None);
        assert_eq!(of("report --color --color=never"), None);
    }
}
