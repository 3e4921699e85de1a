//! `trapline man` and `trapline completions`: what a shell and `man` want to know of the command line.
//!
//! Owns the options of both verbs. The texts are made from the command line that clap parses, so that they cannot differ from it.

use std::{fs, path::PathBuf};

use anyhow::{Context, Result};
use clap::{Args, CommandFactory as _};
use clap_complete::Shell;
use clap_mangen::Man;

use crate::{Outcome, info::print};

/// Writes the manual: one page a verb.
#[derive(Debug, Args)]
#[command(after_help = MAN_HELP)]
pub(crate) struct ManArguments {
    /// Where the pages go, a folder that is made if it is not there; without it, the page of `trapline` itself is printed
    #[arg(value_name = "DIR")]
    directory: Option<PathBuf>,
}

const MAN_HELP: &str = "\
Examples:
  trapline man | man -l -
  trapline man ~/.local/share/man/man1 && man trapline-record";

/// Prints a script that lets a shell complete verbs, options and their values.
#[derive(Debug, Args)]
#[command(after_help = COMPLETIONS_HELP)]
pub(crate) struct CompletionsArguments {
    /// The shell
    #[arg(value_enum, value_name = "SHELL")]
    shell: Shell,
}

const COMPLETIONS_HELP: &str = "\
Examples:
  trapline completions bash > ~/.local/share/bash-completion/completions/trapline
  trapline completions zsh > ~/.zfunc/_trapline
  trapline completions fish > ~/.config/fish/completions/trapline.fish";

/// Writes the pages, or prints the first.
pub(crate) fn man(arguments: &ManArguments) -> Result<Outcome> {
    // Without the verb `help`, which has a page for every other.
    let command = crate::Arguments::command().disable_help_subcommand(true);
    if let Some(directory) = &arguments.directory {
        let cannot = || format!("cannot write the manual to {}", directory.display());
        fs::create_dir_all(directory).with_context(cannot)?;
        clap_mangen::generate_to(command, directory).with_context(cannot)?;
    } else {
        let mut page = Vec::new();
        Man::new(command).render(&mut page).context("cannot make the page")?;
        print(&String::from_utf8_lossy(&page))?;
    }
    Ok(Outcome::Good)
}

/// Prints the script.
pub(crate) fn completions(arguments: &CompletionsArguments) -> Result<Outcome> {
    let mut script = Vec::new();
    clap_complete::generate(arguments.shell, &mut crate::Arguments::command(), "trapline", &mut script);
    print(&String::from_utf8_lossy(&script))?;
    Ok(Outcome::Good)
}
