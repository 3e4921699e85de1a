//! Builds the agent, in all of its variants, which travel inside the recorder.
//!
//! The sources of the agent and of the layouts are reached by links below this folder: a packaged crate has copies of them there.

use std::{
    env, fs,
    path::{Path, PathBuf},
    process::{Command, ExitCode},
};

#[path = "agent/object.rs"]
mod object;

/// What the agent for 32-bit processes is built for.
const NARROW_TARGET: &str = "i686-unknown-linux-gnu";

fn main() -> ExitCode {
    for path in ["agent/object.rs", "agent/src", "abi/src"] {
        // Where the links lead: what changes is there.
        println!("cargo::rerun-if-changed={}", fs::canonicalize(path).unwrap_or_else(|_| path.into()).display());
    }
    let read = |name: &str| env::var_os(name).unwrap_or_default();
    let target = env::var("TARGET").unwrap_or_default();
    let target = if target.starts_with("x86_64-") { target } else { "x86_64-unknown-linux-gnu".to_owned() };
    let linker = env::var_os("RUSTC_LINKER").unwrap_or_else(|| "cc".into());
    let toolchain = object::Toolchain { rustc: read("RUSTC"), linker, target };
    let narrow = object::Toolchain { target: NARROW_TARGET.to_owned(), linker: "cc".into(), rustc: read("RUSTC") };
    let (agent_dir, out_dir) = (Path::new(&read("CARGO_MANIFEST_DIR")).join("agent"), read("OUT_DIR"));
    let out_dir = Path::new(&out_dir);
    for (toolchain, variant) in [
        (&toolchain, object::Variant::Preloaded),
        (&toolchain, object::Variant::Injected),
        (&narrow, object::Variant::Narrow),
    ] {
        let built = if variant == object::Variant::Narrow && !has_library(&narrow) {
            // The recorder says what to do when it meets a 32-bit program.
            fs::write(out_dir.join(variant.file_name()), []).map_err(|error| error.to_string())
        } else {
            object::build(&agent_dir, out_dir, toolchain, variant).map(drop)
        };
        if let Err(error) = built {
            eprintln!("{error}");
            return ExitCode::FAILURE;
        }
    }
    ExitCode::SUCCESS
}

/// Whether the target's library is installed. When that changes, we are run again.
fn has_library(toolchain: &object::Toolchain) -> bool {
    let asked =
        Command::new(&toolchain.rustc).args(["--print", "target-libdir", "--target", &toolchain.target]).output();
    let Ok(asked) = asked else { return false };
    let folder = PathBuf::from(String::from_utf8_lossy(&asked.stdout).trim());
    let Some(target) = folder.parent() else { return false };
    println!("cargo::rerun-if-changed={}", target.display());
    folder.is_dir()
}
