//! What is to be executed, and whether it can be traced at all: decided before anything is started.
//!
//! Owns [`Program`]. Invariant: a program that is refused here was not started, and the error says what to do instead.

use std::{
    env,
    ffi::{OsStr, OsString},
    fs::{self, File, Metadata},
    io::Read,
    os::unix::{ffi::OsStrExt, fs::MetadataExt, fs::PermissionsExt},
    path::{Path, PathBuf},
};

use object::{
    Endianness, FileKind, Object, ObjectKind,
    elf::{self, FileHeader32, FileHeader64, PT_INTERP},
    read::elf::{FileHeader, ProgramHeader},
};

use trapline_engine::Mode;

use crate::{
    agent::Agent,
    arm::NO_NARROW_AGENT,
    error::{Doing, Error},
    sys::{spawn, width},
};

/// A program that can be started.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct Program {
    /// The file to execute.
    pub(crate) path: PathBuf,
    /// Its arguments, the first is its name as it was given.
    pub(crate) arguments: Vec<OsString>,
}

/// How long a line `#!interpreter` may be (`BINPRM_BUF_SIZE` of the kernel).
const SCRIPT_LINE_BYTES: usize = 256;

/// Scripts whose interpreter is a script, and so on: the kernel follows five.
const MAX_SCRIPTS: u32 = 5;

impl Program {
    /// Finds the program of a command as a shell would, and checks that it can be executed and traced.
    pub(crate) fn find(command: &[OsString]) -> Result<Self, Error> {
        let name = command.first().ok_or_else(|| Error::NotFound(String::new()))?;
        let path = search(name)?;
        check(&path, 0)?;
        Ok(Self { path, arguments: command.to_vec() })
    }
}

fn search(name: &OsStr) -> Result<PathBuf, Error> {
    let not_found = || Error::NotFound(name.to_string_lossy().into_owned());
    if name.as_bytes().contains(&b'/') {
        let path = PathBuf::from(name);
        return if path.exists() { Ok(path) } else { Err(not_found()) };
    }
    if name.is_empty() {
        return Err(not_found());
    }
    let path = env::var_os("PATH").unwrap_or_else(|| "/usr/local/bin:/usr/bin:/bin".into());
    let candidates: Vec<PathBuf> =
        env::split_paths(&path).map(|folder| folder.join(name)).filter(|path| path.is_file()).collect();
    let executable = candidates.iter().find(|path| fs::metadata(path).is_ok_and(|metadata| is_executable(&metadata)));
    executable.or(candidates.first()).cloned().ok_or_else(not_found)
}

fn is_executable(metadata: &Metadata) -> bool {
    metadata.permissions().mode() & 0o111 != 0
}

fn check(path: &Path, scripts: u32) -> Result<(), Error> {
    let cannot_execute =
        |reason: &str| Err(Error::NotExecutable { path: path.to_path_buf(), reason: reason.to_owned() });
    let cannot_trace = |reason: &str| Err(Error::NotTraceable { path: path.to_path_buf(), reason: reason.to_owned() });
    let metadata = fs::metadata(path).doing(|| format!("looking at {}", path.display()))?;
    if metadata.is_dir() {
        return cannot_execute("it is a directory");
    }
    if !is_executable(&metadata) {
        return cannot_execute("it has no permission to be executed; `chmod +x` gives it");
    }
    let mode = metadata.permissions().mode();
    let gains_rights = mode & libc::S_ISUID != 0 && metadata.uid() != spawn::user() || mode & libc::S_ISGID != 0;
    if gains_rights && spawn::user() != 0 {
        return cannot_trace(
            "it is setuid or setgid, and would lose those rights under a tracer; run trapline as root",
        );
    }
    let mut head = vec![0; SCRIPT_LINE_BYTES];
    let mut file = File::open(path).doing(|| format!("reading {}", path.display()))?;
    let read = file.read(&mut head).doing(|| format!("reading {}", path.display()))?;
    head.truncate(read);
    if let Some(line) = head.strip_prefix(b"#!") {
        let line = line.split(|byte| *byte == b'\n').next().unwrap_or_default();
        let interpreter = line.split(|byte| matches!(byte, b' ' | b'\t' | b'\r')).find(|word| !word.is_empty());
        let Some(interpreter) = interpreter else { return cannot_execute("its first line names no interpreter") };
        let interpreter = Path::new(OsStr::from_bytes(interpreter));
        if !interpreter.exists() {
            return cannot_execute(&format!(
                "its interpreter {} does not exist; install it, or mend the first line",
                interpreter.display()
            ));
        }
        return if scripts < MAX_SCRIPTS {
            check(interpreter, scripts + 1)
        } else {
            cannot_execute("its interpreters are scripts without end")
        };
    }
    let bytes = fs::read(path).doing(|| format!("reading {}", path.display()))?;
    if !bytes.starts_with(&elf::ELFMAG) {
        return cannot_execute(
            "it is neither a program (ELF) nor a script that begins with `#!`; run it by its interpreter",
        );
    }
    let Ok(file) = object::File::parse(&*bytes) else { return cannot_execute("its ELF headers are broken") };
    if width::is_too_wide(if file.is_64() { Mode::Bits64 } else { Mode::Bits32 }) {
        return cannot_trace(width::TOO_WIDE);
    }
    if !file.is_64() && Agent::injected(Mode::Bits32).is_none() {
        return cannot_trace(NO_NARROW_AGENT);
    }
    if !matches!(file.kind(), ObjectKind::Executable | ObjectKind::Dynamic) {
        return cannot_execute("it is an object file; link it first");
    }
    match interpreter(&bytes) {
        None => cannot_trace(
            "it is linked statically, so that no agent can be loaded into it; link it dynamically (for Rust: a -gnu target without crt-static)",
        ),
        Some(interpreter) if !interpreter.exists() => {
            cannot_execute(&format!("its dynamic linker {} does not exist; install it", interpreter.display()))
        }
        Some(_) => Ok(()),
    }
}

fn interpreter(bytes: &[u8]) -> Option<PathBuf> {
    match FileKind::parse(bytes).ok()? {
        FileKind::Elf32 => interpreter_of::<FileHeader32<Endianness>>(bytes),
        _ => interpreter_of::<FileHeader64<Endianness>>(bytes),
    }
}

fn interpreter_of<H: FileHeader<Endian = Endianness>>(bytes: &[u8]) -> Option<PathBuf> {
    let header = H::parse(bytes).ok()?;
    let endian = header.endian().ok()?;
    let headers = header.program_headers(endian, bytes).ok()?;
    let interpreter = headers.iter().find(|header| header.p_type(endian) == PT_INTERP)?;
    let text = interpreter.data(endian, bytes).ok()?;
    let text = text.split(|byte| *byte == 0).next()?;
    Some(PathBuf::from(OsStr::from_bytes(text)))
}
