//! Builds the agent, in both of its variants, which travel inside the recorder.

use std::{env, path::Path, process::ExitCode};

#[path = "../agent/object.rs"]
mod object;

fn main() -> ExitCode {
    for path in ["../agent/object.rs", "../agent/src", "../abi/src"] {
        println!("cargo::rerun-if-changed={path}");
    }
    let read = |name: &str| env::var_os(name).unwrap_or_default();
    let target = env::var("TARGET").unwrap_or_default();
    let target = if target.starts_with("x86_64-") { target } else { "x86_64-unknown-linux-gnu".to_owned() };
    let linker = env::var_os("RUSTC_LINKER").unwrap_or_else(|| "cc".into());
    let toolchain = object::Toolchain { rustc: read("RUSTC"), linker, target };
    let (agent_dir, out_dir) = (Path::new(&read("CARGO_MANIFEST_DIR")).join("../agent"), read("OUT_DIR"));
    for variant in [object::Variant::Preloaded, object::Variant::Injected] {
        if let Err(error) = object::build(&agent_dir, Path::new(&out_dir), &toolchain, variant) {
            eprintln!("{error}");
            return ExitCode::FAILURE;
        }
    }
    ExitCode::SUCCESS
}
