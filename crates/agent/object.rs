//! Builds the agent's shared object.
//!
//! Shared by the build script of the recorder, which embeds the object, and by the agent's tests. The compiler is called directly: a nested cargo
//! would want a lock file, a target directory, and its turn. The linker gets a single object file, the layouts' library, and `--no-undefined`, which proves
//! that the agent needs nothing: no C library, no `memcpy`, and nothing of `core` that could panic.

use std::{
    ffi::OsString,
    fmt::Write as _,
    path::{Path, PathBuf},
    process::Command,
};

/// The tools, and for what they build.
pub struct Toolchain {
    /// `rustc`.
    pub rustc: OsString,
    /// A C compiler that links.
    pub linker: OsString,
    /// The target's triple.
    pub target: String,
}

/// Builds it in `out_dir` from the sources beside `agent_dir`, and returns its path.
///
/// # Errors
/// What was being done, and what the tool said.
pub fn build(agent_dir: &Path, out_dir: &Path, toolchain: &Toolchain) -> Result<PathBuf, String> {
    let abi_source = agent_dir.join("../abi/src/lib.rs");
    let agent_source = agent_dir.join("src/lib.rs");
    let layouts = out_dir.join("libtrapline_abi.rlib");
    let code = out_dir.join("trapline_agent.o");
    let object = out_dir.join("trapline-agent.so");
    let script = out_dir.join("trapline-agent.map");
    let mut compile = rustc(toolchain);
    compile.args(["--crate-name", "trapline_abi", "--emit", "link"]).arg(abi_source).arg("-o").arg(&layouts);
    run(&mut compile, "compile the layouts that the agent and the recorder share")?;
    let mut compile = rustc(toolchain);
    compile.args(["--crate-name", "trapline_agent", "--emit", "obj"]).arg(agent_source).arg("-o").arg(&code);
    let mut library = OsString::from("trapline_abi=");
    library.push(&layouts);
    compile.arg("--extern").arg(library);
    run(&mut compile, "compile the agent")?;
    std::fs::write(&script, "{ local: *; };\n")
        .map_err(|error| format!("cannot write {}: {error}", script.display()))?;
    let mut link = Command::new(&toolchain.linker);
    link.args(["-shared", "-nostdlib", "-nostartfiles", "-o"]).arg(&object).arg(&code).arg(&layouts);
    link.args([
        "-Wl,-soname,trapline-agent.so",
        "-Wl,-Bsymbolic",
        "-Wl,--no-undefined",
        "-Wl,--eh-frame-hdr",
        "-Wl,-z,relro",
        "-Wl,-z,now",
        "-Wl,-z,noexecstack",
        "-Wl,-z,max-page-size=4096",
        "-Wl,--hash-style=gnu",
        "-Wl,--build-id=none",
    ]);
    let mut exports = OsString::from("-Wl,--version-script=");
    exports.push(&script);
    link.arg(exports);
    run(&mut link, "link the agent")?;
    Ok(object)
}

fn rustc(toolchain: &Toolchain) -> Command {
    let mut command = Command::new(&toolchain.rustc);
    command.args(["--edition", "2024", "--crate-type", "lib", "--target", &toolchain.target]);
    for option in [
        "opt-level=3",
        "panic=abort",
        "codegen-units=1",
        "relocation-model=pic",
        "force-unwind-tables=yes",
        "debug-assertions=off",
        "overflow-checks=off",
        "embed-bitcode=no",
    ] {
        command.args(["-C", option]);
    }
    command
}

fn run(command: &mut Command, what: &str) -> Result<(), String> {
    let mut text = format!("cannot {what}: ");
    let failure = match command.output() {
        Ok(output) if output.status.success() => return Ok(()),
        Ok(output) => format!("{}\n{}", output.status, String::from_utf8_lossy(&output.stderr)),
        Err(error) => error.to_string(),
    };
    // Writing to a string does not fail.
    let _ = write!(text, "{command:?}: {failure}");
    Err(text)
}
