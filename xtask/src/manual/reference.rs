//! The reference of the command line: the help of each verb, asked of the command itself.
//!
//! Owns [`PAGE`] and [`of`]. Nothing is known here of the verbs: their lists are in the help.

use std::{path::Path, process::Command};

use anyhow::{Context, Result, ensure};

/// The page's file.
pub(crate) const PAGE: &str = "reference.md";

const BEGIN: &str = "\
# Every verb

What `trapline --help` and `trapline VERB --help` print. This page is made from them by `cargo xtask manual --write`, and `cargo xtask manual` says when it is not what the command prints.
";

/// The page, of this command.
///
/// # Errors
/// The command cannot be asked.
pub(crate) fn of(trapline: &Path) -> Result<String> {
    let mut page = BEGIN.to_owned();
    add(trapline, &[], &mut page)?;
    Ok(page)
}

/// Adds the help of a verb, and of those below it.
fn add(trapline: &Path, words: &[String], page: &mut String) -> Result<()> {
    let help = help(trapline, words)?;
    let title = [&["trapline".to_owned()], words].concat().join(" ");
    page.extend(["\n## ", &title, "\n\n```console\n", help.trim_end(), "\n```\n"]);
    for verb in verbs(&help) {
        add(trapline, &[words, &[verb]].concat(), page)?;
    }
    Ok(())
}

fn help(trapline: &Path, words: &[String]) -> Result<String> {
    let output = Command::new(trapline)
        .args(words)
        .arg("--help")
        .env("NO_COLOR", "1")
        .env_remove("TRAPLINE_OUTPUT")
        .env_remove("TRAPLINE_ON_FULL")
        .output()
        .with_context(|| format!("running {}", trapline.display()))?;
    ensure!(output.status.success(), "`{} --help` ended with {}", words.join(" "), output.status);
    let text = String::from_utf8(output.stdout).context("help that is no text")?;
    // The room behind words is no part of the page.
    Ok(text.lines().flat_map(|line| [line.trim_end(), "\n"]).collect())
}

/// The verbs that a help lists.
fn verbs(help: &str) -> Vec<String> {
    let listed = help.lines().skip_while(|line| *line != "Commands:").skip(1).take_while(|line| !line.is_empty());
    let names = listed.filter(|line| line.starts_with("  ") && !line.starts_with("   "));
    names.filter_map(|line| line.split_whitespace().next()).filter(|name| *name != "help").map(str::to_owned).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn verbs_are_those_of_the_list() {
        let help = "Does it\n\nUsage: x\n\nCommands:\n  record  Records\n          at length\n  help    This\n\nOptions:\n  -h  Help\n";
        assert_eq!(verbs(help), ["record"]);
        assert_eq!(verbs("Usage: x\n"), Vec::<String>::new());
    }
}
