//! `trapline patch`: builds live patches, and tells what is in them. What it does in processes is in `live`.
//!
//! Owns the options of its verbs and both forms of the description. What a patch is, what is refused and why comes from `trapline-patch`. Invariant: a patch that
//! was refused leaves no file.

use std::{
    collections::BTreeMap,
    fmt::Write as _,
    fs,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result};
use clap::{Args, Subcommand};
use serde_json::{Value, json};
use trapline_patch::{Error, Note, NoteKind, Pair, Patch, Place, Refusal, Request, Role};
use trapline_trace::hexadecimal;

#[cfg(target_arch = "x86_64")]
use crate::live;
use crate::{Outcome, Refused, cargo, info::print};

/// Of the JSON description. Keys may be added without a new version.
const JSON_VERSION: u32 = 1;

/// Builds live patches from recompiled objects, and puts them into running processes.
#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  trapline patch build --help\n  trapline patch show fix.tlp")]
pub(crate) struct Arguments {
    #[command(subcommand)]
    verb: Verb,
}

impl Arguments {
    /// Whether a patch is shown, and nothing built.
    pub(crate) fn is_show(&self) -> bool {
        matches!(self.verb, Verb::Show(_))
    }
}

#[derive(Debug, Subcommand)]
enum Verb {
    Build(BuildArguments),
    Show(ShowArguments),
    #[cfg(target_arch = "x86_64")]
    Apply(live::ApplyArguments),
    #[cfg(target_arch = "x86_64")]
    Revert(live::RevertArguments),
    #[cfg(target_arch = "x86_64")]
    List(live::ListArguments),
    #[cfg(target_arch = "x86_64")]
    Status(live::ListArguments),
    #[cfg(target_arch = "x86_64")]
    Symbols(live::SymbolsArguments),
}

/// Builds a patch: the functions that changed between two objects, for an executable.
#[derive(Debug, Args)]
#[command(after_help = BUILD_HELP)]
struct BuildArguments {
    /// The executable or library that the process runs.
    #[arg(long, value_name = "EXE")]
    target: PathBuf,
    /// The object that the target was made of. Without it, all functions of the new one that the target has are replaced.
    #[arg(long, value_name = "OLD.o")]
    old: Vec<PathBuf>,
    /// The recompiled object. Several belong to the old ones in their order.
    #[arg(long, value_name = "NEW.o", required_unless_present = "cargo")]
    new: Vec<PathBuf>,
    /// A project of Cargo, as it was when the target was built and as it is now, instead of objects. Both are built, in target/trapline of each.
    #[arg(long, num_args = 2, value_names = ["OLD_DIR", "NEW_DIR"], conflicts_with_all = ["old", "new"])]
    cargo: Option<Vec<PathBuf>>,
    /// The profile that the target was built with.
    #[arg(long, default_value = "release", requires = "cargo")]
    profile: String,
    /// The patch file.
    #[arg(short, long, value_name = "FIX.tlp")]
    output: PathBuf,
    /// What the patch is called; `revert` goes by it.
    #[arg(long)]
    name: Option<String>,
    /// A function that nobody may be in while the patch is applied or reverted, although it stays: the caller of functions that must change together.
    #[arg(long, value_name = "FUNCTION")]
    pin: Vec<String>,
    /// Accept that copies of replaced functions, inlined into others, stay as they are.
    #[arg(long)]
    allow_inlined: bool,
    /// Print one JSON object instead of text.
    #[arg(long)]
    json: bool,
    /// What `cargo build` is told besides, such as features; without, it builds the binary that is called as the target.
    #[arg(last = true, value_name = "OPTIONS", requires = "cargo")]
    more: Vec<String>,
}

const BUILD_HELP: &str = "\
Compile both objects with the compiler and flags that the target was compiled with, and -ffunction-sections -fdata-sections.

Example:
  gcc -O2 -g -ffunction-sections -fdata-sections -c server.c -o new.o
  trapline patch build --target ./server --old old.o --new new.o -o fix.tlp
  trapline patch show fix.tlp

A project of Cargo, whose release build runs:
  trapline patch build --target ./server --cargo ../before . -o fix.tlp";

/// Tells what is in a patch, what was left out of it, and why.
#[derive(Debug, Args)]
#[command(after_help = "Example:\n  trapline patch show fix.tlp --json")]
struct ShowArguments {
    /// The patch file.
    #[arg(value_name = "FIX.tlp")]
    file: PathBuf,
    /// Print one JSON object instead of text.
    #[arg(long)]
    json: bool,
}

/// Carries out a verb.
pub(crate) fn run(arguments: &Arguments) -> Result<Outcome> {
    match &arguments.verb {
        Verb::Build(arguments) => build(arguments),
        Verb::Show(arguments) => show(arguments),
        #[cfg(target_arch = "x86_64")]
        Verb::Apply(arguments) => live::apply(arguments),
        #[cfg(target_arch = "x86_64")]
        Verb::Revert(arguments) => live::revert(arguments),
        #[cfg(target_arch = "x86_64")]
        Verb::List(arguments) => live::list(arguments, false),
        #[cfg(target_arch = "x86_64")]
        Verb::Status(arguments) => live::list(arguments, true),
        #[cfg(target_arch = "x86_64")]
        Verb::Symbols(arguments) => live::symbols(arguments),
    }
}

fn build(arguments: &BuildArguments) -> Result<Outcome> {
    if !arguments.old.is_empty() && arguments.old.len() != arguments.new.len() {
        let text = "give an --old object for every --new one, in the same order, or none at all";
        return Err(Refused(text.to_owned()).into());
    }
    let olds = arguments.old.iter().cloned().map(Some).chain(std::iter::repeat(None));
    let pairs = match arguments.cargo.as_deref() {
        Some([old, new]) => cargo::objects(&cargo::Project {
            old,
            new,
            target: &arguments.target,
            profile: &arguments.profile,
            more: &arguments.more,
        })?,
        _ => olds.zip(arguments.new.iter().cloned()).map(|(old, new)| Pair { old, new }).collect(),
    };
    let request = Request {
        target: arguments.target.clone(),
        pairs,
        // The objects of a project have names that say nothing.
        name: arguments.name.clone().or_else(|| {
            let target = arguments.target.file_name().filter(|_| arguments.cargo.is_some());
            target.map(|name| name.to_string_lossy().into_owned())
        }),
        pins: arguments.pin.clone(),
        allow_inlined: arguments.allow_inlined,
    };
    let patch = match trapline_patch::build(&request) {
        Ok(patch) => patch,
        Err(error) => {
            if let Error::Refused(refusals) = &error
                && arguments.json
            {
                let refused: Vec<Value> = refusals.iter().map(refusal_json).collect();
                print(&format!("{}\n", json!({ "version": JSON_VERSION, "refused": refused })))?;
            }
            let is_refusal = !matches!(error, Error::Unreadable { .. });
            return Err(if is_refusal { Refused(error.to_string()).into() } else { error.into() });
        }
    };
    let output = &arguments.output;
    fs::write(output, patch.encode()).with_context(|| format!("cannot write the patch to {}", output.display()))?;
    tell(&patch, arguments.json)
}

fn show(arguments: &ShowArguments) -> Result<Outcome> {
    tell(&read(&arguments.file)?, arguments.json)
}

/// Reads a patch file.
pub(crate) fn read(path: &Path) -> Result<Patch> {
    let bytes = fs::read(path).with_context(|| format!("cannot read {}", path.display()))?;
    Patch::decode(&bytes).map_err(|error| Refused(format!("{}: {error}", path.display())).into())
}

fn tell(patch: &Patch, as_json: bool) -> Result<Outcome> {
    let text = if as_json { format!("{}\n", described(patch)) } else { told(patch) };
    print(&text)?;
    Ok(Outcome::Good)
}

fn refusal_json(refusal: &Refusal) -> Value {
    json!({
        "object": refusal.object, "symbol": refusal.symbol, "reason": refusal.reason.code(),
        "text": refusal.reason.text(), "detail": refusal.detail,
    })
}

fn note_json(note: &Note) -> Value {
    json!({ "kind": note.kind.code(), "symbol": note.symbol, "object": note.object, "detail": note.detail })
}

/// The length of a replacement: of its section, which it has for itself.
fn new_len(patch: &Patch, symbol: u32) -> u64 {
    match patch.symbols[symbol as usize].place {
        Place::Own { section, .. } => patch.sections[section as usize].len_bytes,
        _ => 0,
    }
}

fn sizes(patch: &Patch) -> BTreeMap<&'static str, u64> {
    let mut sizes = BTreeMap::new();
    for section in &patch.sections {
        let role = match section.role {
            Role::Code => "code",
            Role::ReadOnly => "constants",
            Role::Unwind => "unwind",
            Role::Data | Role::Zero => "data",
        };
        *sizes.entry(role).or_default() += section.len_bytes;
    }
    sizes
}

/// What the new code refers to by name, outside of the target.
fn imports(patch: &Patch) -> Vec<String> {
    let imported = patch.symbols.iter().filter_map(|symbol| match &symbol.place {
        Place::Import { version: Some(version), .. } => Some(format!("{}@{version}", symbol.name)),
        Place::Import { version: None, .. } => Some(symbol.name.clone()),
        _ => None,
    });
    let mut imported: Vec<String> = imported.collect();
    imported.sort_unstable();
    imported.dedup();
    imported
}

fn described(patch: &Patch) -> Value {
    let functions = patch.functions.iter().map(|function| {
        json!({
            "name": function.name, "object": function.object, "address": function.address, "old_bytes": function.expected.len(),
            "new_bytes": new_len(patch, function.symbol), "parts": function.parts,
        })
    });
    let (left_out, notes): (Vec<_>, Vec<_>) = patch.notes.iter().partition(|note| note.kind.is_left_out());
    json!({
        "version": JSON_VERSION, "name": patch.name,
        "target": {
            "name": patch.target.name, "build_id": hexadecimal(&patch.target.build_id), "bits": patch.target.mode.bitness(),
        },
        "functions": functions.collect::<Vec<Value>>(),
        "pins": patch.pins.iter().map(|pin| json!({ "name": pin.name, "address": pin.address, "bytes": pin.len_bytes })).collect::<Vec<Value>>(),
        "callbacks": patch.callbacks.iter().map(|callback| callback.when.code()).collect::<Vec<_>>(),
        "imports": imports(patch), "bytes": sizes(patch),
        "notes": notes.into_iter().map(note_json).collect::<Vec<Value>>(),
        "left_out": left_out.into_iter().map(note_json).collect::<Vec<Value>>(),
    })
}

fn told(patch: &Patch) -> String {
    let target = &patch.target;
    let mut told = format!(
        "patch      {}\ntarget     {}, {} bit, build-id {}\n",
        patch.name,
        target.name,
        target.mode.bitness(),
        hexadecimal(&target.build_id)
    );
    for function in &patch.functions {
        let (old, new) = (function.expected.len(), new_len(patch, function.symbol));
        let _ = writeln!(told, "replaces   {} ({old} bytes at {:#x}, {new} new)", function.name, function.address);
    }
    for pin in &patch.pins {
        let _ = writeln!(told, "pins       {}", pin.name);
    }
    for callback in &patch.callbacks {
        let _ = writeln!(told, "calls      trapline_{}", callback.when.code());
    }
    let sizes: Vec<String> = sizes(patch).iter().map(|(role, bytes)| format!("{role} {bytes}")).collect();
    let _ = writeln!(told, "brings     {} bytes", sizes.join(", "));
    for import in imports(patch) {
        let _ = writeln!(told, "imports    {import}");
    }
    let unchanged = patch.notes.iter().filter(|note| note.kind == NoteKind::Unchanged).count();
    for note in patch.notes.iter().filter(|note| note.kind != NoteKind::Unchanged) {
        let head = if note.kind.is_left_out() { "left out" } else { "note" };
        let detail = if note.detail.is_empty() { String::new() } else { format!(" ({})", note.detail) };
        let _ = writeln!(told, "{head:<10} {}: {}{detail}", note.symbol, note.kind.text());
    }
    if unchanged > 0 {
        let _ = writeln!(told, "left out   {unchanged} functions that are what they were (--json names them)");
    }
    told
}
