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
pub(crate) struct Toolchain {
    /// `rustc`.
    pub(crate) rustc: OsString,
    /// A C compiler that links.
    pub(crate) linker: OsString,
    /// The target's triple.
    pub(crate) target: String,
}

/// How the object comes into a process, and where its threads have their state then.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Variant {
    /// The dynamic linker preloads it: in initial-exec thread-local storage.
    Preloaded,
    /// The recorder maps it into a process that runs already: from a thread pointer of its own on, the base of the gs segment.
    Injected,
    /// The recorder maps it into a 32-bit process, and fills in every address: from the base of the fs segment on.
    Narrow,
}

impl Variant {
    /// The name of the object's file.
    pub(crate) fn file_name(self) -> &'static str {
        match self {
            Self::Preloaded => "trapline-agent.so",
            Self::Injected => "trapline-agent-injected.so",
            Self::Narrow => "trapline-agent-i386.so",
        }
    }
}

/// Builds it in `out_dir` from the sources beside `agent_dir`, and returns its path.
///
/// # Errors
/// What was being done, and what the tool said.
pub(crate) fn build(
    agent_dir: &Path,
    out_dir: &Path,
    toolchain: &Toolchain,
    variant: Variant,
) -> Result<PathBuf, String> {
    let abi_source = agent_dir.join("../abi/src/lib.rs");
    let agent_source = agent_dir.join("src/lib.rs");
    let layouts = out_dir.join("libtrapline_abi.rlib");
    let code = out_dir.join("trapline_agent.o");
    let object = out_dir.join(variant.file_name());
    let script = out_dir.join("trapline-agent.map");
    let mut compile = rustc(toolchain, variant);
    compile.args(["--crate-name", "trapline_abi", "--emit", "link"]).arg(abi_source).arg("-o").arg(&layouts);
    run(&mut compile, "compile the layouts that the agent and the recorder share")?;
    let mut compile = rustc(toolchain, variant);
    compile.args(["--crate-name", "trapline_agent", "--emit", "obj"]).arg(agent_source).arg("-o").arg(&code);
    let mut library = OsString::from("trapline_abi=");
    library.push(&layouts);
    compile.arg("--extern").arg(library);
    if variant == Variant::Injected {
        compile.args(["--cfg", "feature=\"injected\""]);
    }
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
    if variant == Variant::Narrow {
        link.args(["-m32", "-Wl,-z,notext"]);
    }
    let mut exports = OsString::from("-Wl,--version-script=");
    exports.push(&script);
    link.arg(exports);
    run(&mut link, "link the agent")?;
    if variant == Variant::Narrow {
        return Ok(object);
    }
    let mut bytes = std::fs::read(&object).map_err(|error| format!("cannot read {}: {error}", object.display()))?;
    tell_thread_offset(&mut bytes)
        .ok_or("cannot find where the agent's relocations are; please report which linker this is")?;
    std::fs::write(&object, bytes).map_err(|error| format!("cannot write {}: {error}", object.display()))?;
    Ok(object)
}

/// Moves the relocation of `trapline_thread_told` (8 bytes into the thread's state) from the linker's table to the word of the configuration that
/// holds its mark, and makes it that of the state's start.
fn tell_thread_offset(bytes: &mut [u8]) -> Option<()> {
    const SHT_RELA: u32 = 4;
    const R_X86_64_TPOFF64: u64 = 18;
    let word = |bytes: &[u8], at: usize| Some(u64::from_le_bytes(bytes.get(at..at + 8)?.try_into().ok()?));
    let index = |word: u64| usize::try_from(word).ok();
    // Elf64_Ehdr: e_shoff, e_shnum. Elf64_Shdr: 64 bytes; sh_type, sh_addr, sh_offset, sh_size.
    let sections = index(word(bytes, 0x28)?)?;
    let count = usize::from(u16::from_le_bytes(bytes.get(0x3c..0x3e)?.try_into().ok()?));
    let mark = bytes.windows(16).position(|window| window == b"\xff\xff\xff\xff\xff\xff\xff\xfftrapline")? + 8;
    let (mut told_at, mut relocation) = (None, None);
    for section in (0..count).map(|number| sections + number * 64) {
        let kind = u32::from_le_bytes(bytes.get(section + 4..section + 8)?.try_into().ok()?);
        let (address, offset) = (word(bytes, section + 0x10)?, index(word(bytes, section + 0x18)?)?);
        let len_bytes = index(word(bytes, section + 0x20)?)?;
        if kind == SHT_RELA {
            for at in (offset..offset + len_bytes).step_by(24) {
                if word(bytes, at + 8)? == R_X86_64_TPOFF64 && word(bytes, at + 16)? == 8 {
                    relocation = Some(at);
                }
            }
        } else if kind == 1 && (offset..offset + len_bytes).contains(&mark) {
            told_at = Some(address + (mark - offset) as u64);
        }
    }
    let (told_at, relocation) = (told_at?, relocation?);
    bytes.get_mut(relocation..relocation + 8)?.copy_from_slice(&told_at.to_le_bytes());
    bytes.get_mut(relocation + 16..relocation + 24)?.fill(0);
    bytes.get_mut(mark..mark + 8)?.fill(0);
    Some(())
}

fn rustc(toolchain: &Toolchain, variant: Variant) -> Command {
    let relocation = if variant == Variant::Narrow { "relocation-model=static" } else { "relocation-model=pic" };
    let mut command = Command::new(&toolchain.rustc);
    command.args(["--edition", "2024", "--crate-type", "lib", "--target", &toolchain.target]);
    for option in [
        "opt-level=3",
        "panic=abort",
        "codegen-units=1",
        relocation,
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
