//! What `trapline patch build --cargo` has Cargo do: build a project as it was and as it is, with the objects of its own crates.
//!
//! Owns [`objects`], and [`as_wrapper`], by which Cargo has this command run rustc: it keeps the objects, and asks for debugging information, by which types are compared. Everything else of
//! the project stays: its profile, its codegen units, its flags. Objects of other codegen units would inline other functions than the running program has.
//! Invariant: names of functions depend on a crate's version and on its dependencies; where these differ there is no patch.

use std::{
    collections::{BTreeMap, BTreeSet},
    env,
    ffi::{OsStr, OsString},
    fs,
    os::unix::{fs::MetadataExt, process::CommandExt},
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use anyhow::{Context, Result, bail};
use serde_json::Value;
use trapline_patch::Pair;

use crate::Refused;

/// Set in Cargo's environment: this command is rustc's wrapper.
const IS_WRAPPER: &str = "TRAPLINE_IS_RUSTC_WRAPPER";

/// A project, before and after the change.
pub(crate) struct Project<'a> {
    pub(crate) old: &'a Path,
    pub(crate) new: &'a Path,
    /// The executable that runs.
    pub(crate) target: &'a Path,
    /// As Cargo calls it.
    pub(crate) profile: &'a str,
    /// What goes to `cargo build` besides; without, the binary with the target's name is built.
    pub(crate) more: &'a [String],
}

/// Builds a project twice, and pairs the objects of its crates.
pub(crate) fn objects(project: &Project<'_>) -> Result<Vec<Pair>> {
    let (old, new) = (project.build(project.old)?, project.build(project.new)?);
    if let Some(refusal) = differing(&old.others, &new.others) {
        return Err(Refused(refusal).into());
    }
    let mut pairs = Vec::new();
    for (name, crate_) in &new.own {
        let before = old.own.get(name);
        if let Some(before) = before.filter(|before| before.version != crate_.version) {
            let (before, now) = (&before.version, &crate_.version);
            let text = format!(
                "the version of {} changed from {before} to {now}, and with it the names of all its functions; build with {before} in its Cargo.toml",
                name.0
            );
            return Err(Refused(text).into());
        }
        let before = before.map_or(&[][..], |before| &before.objects);
        pairs.extend(trapline_patch::pair_up(before, &crate_.objects)?);
    }
    if pairs.is_empty() {
        bail!("cargo built no crate of {} itself", project.new.display());
    }
    Ok(pairs)
}

/// What differs in the crates of others, and what to do about it.
fn differing(old: &BTreeSet<String>, new: &BTreeSet<String>) -> Option<String> {
    let list = |crates: Vec<&String>| {
        let names: Vec<&str> = crates.into_iter().map(String::as_str).collect();
        if names.is_empty() { "nothing".to_owned() } else { names.join(", ") }
    };
    let (gone, come) = (list(old.difference(new).collect()), list(new.difference(old).collect()));
    (old != new).then(|| {
        format!(
            "the project depends on other crates than before ({come} instead of {gone}), and a patch has the project's own code only; build with the old Cargo.lock"
        )
    })
}

/// What Cargo has built.
#[derive(Default)]
struct Built {
    /// The project's own, by name and kind.
    own: BTreeMap<(String, String), Crate>,
    /// Those that come from elsewhere.
    others: BTreeSet<String>,
}

struct Crate {
    version: String,
    objects: Vec<PathBuf>,
}

impl Project<'_> {
    fn build(&self, folder: &Path) -> Result<Built> {
        let wrapper = env::current_exe().context("finding this command's own file")?;
        let folder = fs::canonicalize(folder).with_context(|| format!("cannot find {}", folder.display()))?;
        let mut command = Command::new(env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
        command.args(["build", "--profile", self.profile, "--message-format=json-render-diagnostics", "--target-dir"]);
        command.arg(folder.join("target").join("trapline"));
        if self.more.is_empty() {
            command.arg("--bin").arg(self.target.file_name().unwrap_or_default());
        }
        command.args(self.more).current_dir(&folder).stderr(Stdio::inherit()).stdin(Stdio::null());
        command.env("RUSTC_WRAPPER", wrapper).env(IS_WRAPPER, "1");
        let output = command.output().context("starting cargo")?;
        if !output.status.success() {
            bail!("cargo could not build {}: {}", folder.display(), output.status);
        }
        let mut built = Built::default();
        for line in String::from_utf8_lossy(&output.stdout).lines() {
            let Ok(message) = serde_json::from_str::<Value>(line) else { continue };
            if message["reason"] == "compiler-artifact" {
                built.add(&message)?;
            }
        }
        Ok(built)
    }
}

impl Built {
    /// Takes what Cargo says of one crate. Its messages: the Cargo Book, "External tools".
    fn add(&mut self, message: &Value) -> Result<()> {
        let package = message["package_id"].as_str().unwrap_or_default();
        let kind = message["target"]["kind"][0].as_str().unwrap_or_default();
        if kind == "custom-build" || kind == "proc-macro" {
            return Ok(());
        }
        let (source, id) = package.rsplit_once('#').unwrap_or((package, ""));
        let folder = source.rsplit_once('/').map_or(source, |(_, name)| name);
        let (name, version) = id.split_once('@').unwrap_or((folder, id));
        if !source.starts_with("path+") {
            self.others.insert(format!("{name} {version}"));
            return Ok(());
        }
        let target = message["target"]["name"].as_str().unwrap_or_default().to_owned();
        let files = message["filenames"].as_array().into_iter().flatten().filter_map(Value::as_str);
        let objects = objects_of(files.map(Path::new))?;
        self.own.insert((target, kind.to_owned()), Crate { version: version.to_owned(), objects });
        Ok(())
    }
}

/// The objects that lie beside what rustc has written for a crate.
fn objects_of<'a>(mut files: impl Iterator<Item = &'a Path>) -> Result<Vec<PathBuf>> {
    let Some(file) = files.next() else { return Ok(Vec::new()) };
    let folder = file.parent().unwrap_or(Path::new("."));
    let is_in_place = folder.file_name() == Some(OsStr::new("deps"));
    let folder = if is_in_place { folder.to_owned() } else { folder.join("deps") };
    let entries = || -> Result<Vec<PathBuf>> {
        let listed = fs::read_dir(&folder).with_context(|| format!("cannot read {}", folder.display()))?;
        Ok(listed.filter_map(|entry| Some(entry.ok()?.path())).collect())
    };
    // What Cargo puts elsewhere are links to files that have the crate's number in their names.
    let place = |path: &Path| fs::metadata(path).map(|file| (file.dev(), file.ino())).ok();
    let wanted = place(file);
    let entries = entries()?;
    let Some(original) = entries.iter().find(|entry| place(entry) == wanted) else { return Ok(Vec::new()) };
    let name = original.file_name().unwrap_or_default().to_string_lossy().into_owned();
    // Programs have no extension.
    let stem = if original.extension().is_some() { name.strip_prefix("lib").unwrap_or(&name) } else { &name };
    let stem = stem.split('.').next().unwrap_or_default();
    let (mut objects, rest): (Vec<_>, Vec<_>) =
        entries.into_iter().filter(|entry| is_kept_of(entry, stem)).partition(|entry| is_object_of(entry, stem));
    // Bitcode, of which there is much.
    for file in rest {
        let _ = fs::remove_file(file);
    }
    objects.sort_unstable();
    Ok(objects)
}

/// Whether a file is an object of the crate with this name and number.
fn is_object_of(path: &Path, stem: &str) -> bool {
    is_kept_of(path, stem) && path.extension() == Some(OsStr::new("o"))
}

/// Whether a file is of a codegen unit of that crate, and would not be there without us: `STEM.UNIT.rcgu.o`, and what it was made of.
fn is_kept_of(path: &Path, stem: &str) -> bool {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    name.strip_prefix(stem).is_some_and(|rest| rest.starts_with('.') && rest.contains(".rcgu."))
}

/// If Cargo runs this command as rustc's wrapper: runs rustc, and does not come back unless that fails.
pub(crate) fn as_wrapper(given: &[OsString]) -> Option<String> {
    env::var_os(IS_WRAPPER)?;
    let [_, rustc, arguments @ ..] = given else { return Some("it has to be run by cargo".to_owned()) };
    let mut command = Command::new(rustc);
    command.args(arguments);
    let words: Vec<&str> = arguments.iter().filter_map(|word| word.to_str()).collect();
    if let Some(own) = Own::of(&words) {
        if let Some(refusal) = own.refusal {
            return Some(refusal.to_owned());
        }
        // Of an earlier build, which may have had more of them.
        let listed = fs::read_dir(own.folder).into_iter().flatten().filter_map(|entry| Some(entry.ok()?.path()));
        for path in listed.filter(|path| is_kept_of(path, &own.stem)) {
            let _ = fs::remove_file(path);
        }
        // Asked for objects by `--emit`, rustc would make a single one of each crate, and optimise otherwise.
        command.args(["-Csave-temps", "-Cdebuginfo=2"]);
    }
    Some(format!("{}: {}", rustc.to_string_lossy(), command.exec()))
}

/// A crate of the project itself, as rustc is told of it.
#[derive(PartialEq, Eq, Debug)]
struct Own<'a> {
    folder: &'a str,
    /// How the names of its files begin.
    stem: String,
    /// Why there is nothing to take from it, and what to do about that.
    refusal: Option<&'static str>,
}

const OVER_CRATES: &str = "its profile optimises over crates (`lto`), so that no function is a crate's own: set `lto = false` in the profile, build what runs with it, and then the patch";
const OVER_UNITS: &str = "its profile splits crates into codegen units and optimises over these, so that functions have other names in each build: set `codegen-units = 1` in the profile, build what runs with it, and then the patch";

impl<'a> Own<'a> {
    fn of(words: &[&'a str]) -> Option<Self> {
        let after =
            |option: &str| words.iter().position(|word| *word == option).and_then(|at| words.get(at + 1).copied());
        let codegen = |name: &str| {
            words.windows(2).find_map(|pair| (pair[0] == "-C").then(|| pair[1].strip_prefix(name)).flatten())
        };
        let (name, folder) = (after("--crate-name")?, after("--out-dir")?);
        // Cargo quietens warnings in crates of others.
        let is_other = words.contains(&"--cap-lints") || words.iter().any(|word| word.starts_with("--cap-lints="));
        let runs_in_builds = name == "build_script_build" || after("--crate-type") == Some("proc-macro");
        if is_other || runs_in_builds || !words.iter().any(|word| word.starts_with("--emit=") && word.contains("link"))
        {
            return None;
        }
        // The rustc book, "lto" and "codegen-units".
        let lto = codegen("lto");
        let is_optimised = codegen("opt-level=").is_some_and(|level| level != "0");
        let refusal = if lto.is_some_and(|how| how != "=off") || codegen("linker-plugin-lto").is_some() {
            Some(OVER_CRATES)
        } else if is_optimised && lto.is_none() && codegen("codegen-units=") != Some("1") {
            Some(OVER_UNITS)
        } else {
            None
        };
        let stem = format!("{name}{}", codegen("extra-filename=").unwrap_or_default());
        Some(Self { folder, stem, refusal })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn own(line: &str) -> Option<(String, Option<&'static str>)> {
        let words: Vec<&str> = line.split(' ').collect();
        Own::of(&words).map(|own| (format!("{}/{}", own.folder, own.stem), own.refusal))
    }

    const LINE: &str =
        "--crate-name srv --emit=dep-info,link --crate-type bin -C extra-filename=-12ab --out-dir t/deps";

    #[test]
    fn crates_of_the_project_are_told_from_others_and_from_what_builds_run() {
        assert_eq!(own(LINE), Some(("t/deps/srv-12ab".to_owned(), None)));
        assert_eq!(own(&format!("{LINE} --cap-lints allow")), None);
        assert_eq!(own(&LINE.replace("bin", "proc-macro")), None);
        assert_eq!(own(&LINE.replace("srv", "build_script_build")), None);
        assert_eq!(own("-vV"), None);
    }

    #[test]
    fn optimising_over_what_objects_hold_is_noticed() {
        for (more, refusal) in [
            ("-C lto", Some(OVER_CRATES)),
            ("-C lto=thin -C codegen-units=1", Some(OVER_CRATES)),
            ("-C linker-plugin-lto", Some(OVER_CRATES)),
            ("-C opt-level=3", Some(OVER_UNITS)),
            ("-C opt-level=s -C codegen-units=4", Some(OVER_UNITS)),
            ("-C opt-level=3 -C codegen-units=1", None),
            ("-C opt-level=3 -C lto=off", None),
            ("-C opt-level=0", None),
        ] {
            assert_eq!(own(&format!("{LINE} {more}")).map(|own| own.1), Some(refusal), "{more}");
        }
    }

    #[test]
    fn crates_that_came_or_went_are_named() {
        let set = |names: &[&str]| names.iter().map(|name| (*name).to_owned()).collect::<BTreeSet<_>>();
        assert_eq!(differing(&set(&["a 1"]), &set(&["a 1"])), None);
        let told = differing(&set(&["a 1", "b 2"]), &set(&["b 2", "a 2"])).expect("they differ");
        assert!(told.contains("(a 2 instead of a 1)"), "{told}");
    }
}
