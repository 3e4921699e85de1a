//! What people decide once: the configuration file, and the environment before it.
//!
//! Owns the file's place, its keys and what is said of wrong ones. A value is what an option has that is not given: [`Config::applied_to`] makes it the option's default. So the file comes before
//! nothing else, the environment before the file, and options before both. Invariant: a key that is not known, and a value that makes no sense, are errors.

use std::{
    env,
    ffi::OsString,
    fs,
    io::ErrorKind,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result};
use clap::{ColorChoice, Command, ValueEnum, builder::OsStr};
use toml_edit::Document;

use crate::{Refused, report::DEFAULT_TRACE};

/// What options have that are not given.
#[derive(Default)]
pub(crate) struct Config {
    /// When there are colours.
    pub(crate) color: Option<ColorChoice>,
    /// What text on a terminal goes through.
    pub(crate) pager: Option<String>,
    on_full: Option<String>,
    output: Option<OsString>,
}

/// What the system says of a file that is not there for this user.
const NOT_THERE: [ErrorKind; 3] = [ErrorKind::NotFound, ErrorKind::NotADirectory, ErrorKind::PermissionDenied];

/// Of the file.
const KEYS: [&str; 4] = ["color", "on_full", "output", "pager"];

/// The values of `--on-full`, also where the verb is not there that has it.
const ON_FULL: [&str; 3] = ["block", "drop", "overwrite"];

/// What decides on colours in the environment. The streams look there themselves.
const COLOR_VARIABLES: [&str; 3] = ["NO_COLOR", "CLICOLOR", "CLICOLOR_FORCE"];

impl Config {
    /// Reads the file, if there is one, and then the environment.
    pub(crate) fn read() -> Result<Self> {
        let mut config = match path() {
            Some(path) => Self::of_file(&path)?,
            None => Self::default(),
        };
        let set = |name: &str| env::var_os(name).filter(|value| !value.is_empty());
        if COLOR_VARIABLES.into_iter().any(|name| set(name).is_some()) {
            config.color = None;
        }
        if let Some(policy) = set("TRAPLINE_ON_FULL") {
            let policy = policy.to_string_lossy().into_owned();
            config.on_full = Some(
                policy_of(policy).map_err(|wrong| Refused(format!("TRAPLINE_ON_FULL in the environment {wrong}")))?,
            );
        }
        config.output = set("TRAPLINE_OUTPUT").or(config.output);
        // An empty one asks for no pager.
        config.pager = env::var("PAGER").ok().or(config.pager);
        Ok(config)
    }

    fn of_file(path: &Path) -> Result<Self> {
        match fs::read_to_string(path) {
            Ok(text) => {
                Ok(Self::parse(&text)
                    .map_err(|(line, wrong)| Refused(format!("{}:{line}: {wrong}", path.display())))?)
            }
            // Somebody else's, where a command runs as another user and keeps the environment.
            Err(error) if NOT_THERE.contains(&error.kind()) => Ok(Self::default()),
            Err(error) => Err(error).with_context(|| format!("cannot read the configuration {}", path.display())),
        }
    }

    /// Of a file's text; what is wrong has its line.
    fn parse(text: &str) -> Result<Self, (usize, String)> {
        let line_of = |at: Option<std::ops::Range<usize>>| {
            let before = text.get(..at.map_or(0, |at| at.start)).unwrap_or(text);
            before.matches('\n').count() + 1
        };
        let document = Document::parse(text).map_err(|error| (line_of(error.span()), error.message().to_owned()))?;
        let mut config = Self::default();
        for (name, item) in document.iter() {
            let at = document.key(name).and_then(toml_edit::Key::span).or_else(|| item.span());
            let wrong = |what: String| (line_of(at.clone()), what);
            if !KEYS.contains(&name) {
                return Err(wrong(format!("unknown key `{name}`; the keys are {}", KEYS.join(", "))));
            }
            let Some(value) = item.as_str().map(str::to_owned) else {
                return Err(wrong(format!("`{name}` is no string, as in {name} = \"...\"")));
            };
            let taken = match name {
                "color" => color_of(&value).map(|color| config.color = Some(color)),
                "on_full" => policy_of(value).map(|policy| config.on_full = Some(policy)),
                "output" if value.is_empty() => Err("is empty; it is the name of a trace".to_owned()),
                "output" => {
                    config.output = Some(value.into());
                    Ok(())
                }
                _ => {
                    config.pager = Some(value);
                    Ok(())
                }
            };
            taken.map_err(|what| wrong(format!("`{name}` {what}")))?;
        }
        Ok(config)
    }

    /// A command line whose options have these defaults.
    pub(crate) fn applied_to(&self, mut command: Command) -> Command {
        if let Some(color) = self.color.as_ref().and_then(ValueEnum::to_possible_value) {
            command = command.mut_arg("color", |option| option.default_value(color.get_name().to_owned()));
        }
        let verbs: Vec<String> = command.get_subcommands().map(|verb| verb.get_name().to_owned()).collect();
        verbs.into_iter().fold(command, |command, verb| command.mut_subcommand(verb, |verb| self.applied_to_verb(verb)))
    }

    fn applied_to_verb(&self, verb: Command) -> Command {
        verb.mut_args(|option| {
            if let Some(output) = self.output.clone().filter(|_| option.get_default_values() == [DEFAULT_TRACE]) {
                return option.default_value(OsStr::from(output));
            }
            match &self.on_full {
                Some(policy) if option.get_id() == "on_full" => option.default_value(policy.clone()),
                _ => option,
            }
        })
    }
}

/// Where the file is (XDG Base Directory Specification).
fn path() -> Option<PathBuf> {
    let absolute = |name| env::var_os(name).map(PathBuf::from).filter(|path| path.is_absolute());
    let folder = absolute("XDG_CONFIG_HOME").or_else(|| Some(absolute("HOME")?.join(".config")))?;
    Some(folder.join("trapline").join("config.toml"))
}

fn color_of(value: &str) -> Result<ColorChoice, String> {
    ColorChoice::from_str(value, false).map_err(|_| format!("is \"{value}\"; it can be auto, always, never"))
}

fn policy_of(value: String) -> Result<String, String> {
    if ON_FULL.contains(&value.as_str()) {
        Ok(value)
    } else {
        Err(format!("is \"{value}\"; it can be {}", ON_FULL.join(", ")))
    }
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory as _;

    use super::*;

    fn wrong(text: &str) -> String {
        let (line, what) = Config::parse(text).err().expect("an error");
        format!("{line}: {what}")
    }

    #[test]
    fn what_is_wrong_is_told_with_its_line() {
        assert_eq!(
            wrong("# mine\ncolor = \"never\"\ncolour = \"never\""),
            "3: unknown key `colour`; the keys are color, on_full, output, pager"
        );
        assert_eq!(
            wrong("[record]\noutput = \"x\""),
            "1: unknown key `record`; the keys are color, on_full, output, pager"
        );
        assert_eq!(wrong("\ncolor = \"blue\""), "2: `color` is \"blue\"; it can be auto, always, never");
        assert_eq!(wrong("on_full = \"wait\""), "1: `on_full` is \"wait\"; it can be block, drop, overwrite");
        assert_eq!(wrong("output = 5"), "1: `output` is no string, as in output = \"...\"");
        assert_eq!(wrong("output = ''"), "1: `output` is empty; it is the name of a trace");
        assert!(wrong("color = \"never\"\npager = less").starts_with("2: "), "{}", wrong("pager = less"));
        assert!(wrong("pager = 'a'\npager = 'b'").starts_with("2: "), "{}", wrong("pager = 'a'\npager = 'b'"));
    }

    #[test]
    fn all_keys_are_taken_and_an_empty_file_has_none() {
        let config = Config::parse("color = 'always'\non_full = 'drop'\noutput = 'a b'\npager = ''").expect("a file");
        assert_eq!((config.color, config.pager.as_deref()), (Some(ColorChoice::Always), Some("")));
        assert_eq!((config.on_full.as_deref(), config.output), (Some("drop"), Some("a b".into())));
        let empty = Config::parse("").expect("a file");
        assert!(empty.color.is_none() && empty.pager.is_none() && empty.on_full.is_none() && empty.output.is_none());
    }

    #[test]
    fn the_policies_are_those_of_the_option() {
        let command = crate::Arguments::command();
        let record = command.find_subcommand("record").expect("the verb");
        let option = record.get_arguments().find(|option| option.get_id() == "on_full").expect("the option");
        let known: Vec<String> = option.get_possible_values().iter().map(|value| value.get_name().to_owned()).collect();
        assert_eq!(known, ON_FULL);
    }

    #[test]
    fn options_that_are_not_given_have_the_values_of_the_file() {
        let config = Config { output: Some("other.data".into()), ..Config::default() };
        let mut command = config.applied_to(crate::Arguments::command());
        command.build();
        let of_verbs = command
            .get_subcommands()
            .filter(|verb| verb.get_arguments().any(|option| option.get_default_values() == ["other.data"]));
        let known: Vec<&str> = of_verbs.map(Command::get_name).collect();
        assert!(["report", "replay", "info", "graph", "record"].iter().all(|verb| known.contains(verb)), "{known:?}");
        assert!(
            command
                .get_subcommands()
                .all(|verb| verb.get_arguments().all(|option| option.get_default_values() != [DEFAULT_TRACE]))
        );
    }
}
