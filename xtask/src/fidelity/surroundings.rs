//! What two runs of a program have in common, so that both do the same: one interpreted by callgrind, the other on the processor, under trapline.
//!
//! Owns [`Surroundings`]. Valgrind shows in a program's surroundings, and a program that looks there does something else then. Each difference is
//! taken away: the other run gets valgrind's environment variables, has the signal ignored that valgrind keeps for itself (Python counts ignored
//! signals when it ends), and neither has its addresses randomised. Addresses matter to a program that has hash tables of them, or numbers that fit
//! into 30 bits or do not. Such a program has its heap, from which all comes that it hashes, at addresses whose lower 24 bits are the same in both runs
//! ([`Surroundings::with_heap_of`]).

use std::{
    ffi::OsString,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use anyhow::{Context, Result, ensure};

use super::finish;

/// With the costs of stubs of the procedure linkage table apart, or they are added to those of the instruction that called or jumped there.
const CALLGRIND: [&str; 8] = [
    "/usr/bin/valgrind",
    "--quiet",
    "--tool=callgrind",
    "--skip-plt=no",
    "--dump-instr=yes",
    "--collect-jumps=yes",
    "--compress-strings=no",
    "--compress-pos=no",
];

/// Fixed addresses.
const FIXED: [&str; 2] = ["/usr/bin/setarch", "--addr-no-randomize"];

/// Fixed addresses, and valgrind's own signal, 64, is ignored. Variables follow, in their order.
const LIKE_VALGRIND: [&str; 5] = [FIXED[0], FIXED[1], "/usr/bin/env", "--ignore-signal=RTMAX", "--ignore-environment"];

/// With randomised hashes, two runs differ. No PATH: the programs start no other. Python's own allocator takes its memory from mappings, which are placed
/// differently; that of the C library takes it from the heap.
const ENVIRONMENT: &[(&str, &str)] = &[
    ("HOME", "/nonexistent"),
    ("LANG", "C"),
    ("PYTHONHASHSEED", "0"),
    ("PYTHONMALLOC", "malloc"),
    ("PERL_HASH_SEED", "0"),
    ("PYTHONDONTWRITEBYTECODE", "1"),
];

/// Where mappings of the interpreted program begin: above 2^30, where those of programs on the processor are. Valgrind takes no more than 2^33.
const FIRST_ADDRESS: u64 = 0x1_4000_0000;

/// The same at 32 bit.
const FIRST_NARROW_ADDRESS: u64 = 0x1000_0000;

/// The bits of addresses that are made the same. At most so much is added to the first address.
const SAME_BITS: u64 = (1 << 24) - 1;

/// See the module's text.
#[derive(Debug, Clone)]
pub(super) struct Surroundings {
    folder: PathBuf,
    /// What valgrind makes of [`ENVIRONMENT`], for the other runs. In its order, which decides what of the heap each variable takes.
    environment: Vec<String>,
    /// Of the interpreted program's mappings.
    first_address: u64,
    /// Variables that the programs need beside [`ENVIRONMENT`].
    more: Vec<(String, String)>,
}

impl Surroundings {
    /// Finds out what valgrind makes of the environment, to which `more` belongs. Programs run in `folder`; if they are `narrow`, they are 32-bit programs.
    pub(super) fn new(folder: &Path, is_narrow: bool, more: Vec<(String, String)>) -> Result<Self> {
        let mut surroundings =
            Self { folder: folder.to_owned(), environment: Vec::new(), first_address: FIRST_ADDRESS, more };
        let printed = surroundings.interpret(&["/usr/bin/env".to_owned(), "-0".to_owned()], Path::new("/dev/null"))?;
        let printed = String::from_utf8(printed).context("the environment under callgrind is not UTF-8")?;
        // What it preloads is for the width of the program, here that of `env`.
        let (wide, of_width) = ("amd64-linux", if is_narrow { "x86-linux" } else { "amd64-linux" });
        surroundings.environment = printed.split_terminator('\0').map(|word| word.replace(wide, of_width)).collect();
        if is_narrow {
            surroundings.first_address = FIRST_NARROW_ADDRESS;
        }
        Ok(surroundings)
    }

    /// Moves the interpreted program's mappings, and with them its heap, so that `command`, which prints where its heap begins, prints the same in both
    /// runs, as far as [`SAME_BITS`].
    pub(super) fn with_heap_of(mut self, command: &[String]) -> Result<Self> {
        let on_processor = address(&self.execute(&[], command)?)?;
        let interpreted = address(&self.interpret(command, Path::new("/dev/null"))?)?;
        self.first_address += on_processor.wrapping_sub(interpreted) & SAME_BITS;
        let moved = address(&self.interpret(command, Path::new("/dev/null"))?)?;
        ensure!(
            moved & SAME_BITS == on_processor & SAME_BITS,
            "the heap begins at {on_processor:#x}, and under callgrind at {interpreted:#x}; moved, it begins at {moved:#x}"
        );
        Ok(self)
    }

    /// Runs a program in callgrind, which writes its counts to `file`; gives the program's output.
    pub(super) fn interpret(&self, program: &[String], file: &Path) -> Result<Vec<u8>> {
        let mut out: OsString = "--callgrind-out-file=".into();
        out.push(file);
        let mut words: Vec<OsString> = FIXED.iter().chain(&CALLGRIND).map(OsString::from).collect();
        words.extend([out, format!("--aspace-minaddr={:#x}", self.first_address).into()]);
        self.run(&words, program, "callgrind")
    }

    /// Runs a program on the processor, by a recorder's command or by none.
    pub(super) fn execute(&self, recorder: &[OsString], program: &[String]) -> Result<Vec<u8>> {
        let words: Vec<OsString> = LIKE_VALGRIND.iter().map(OsString::from).collect();
        let variables = self.environment.iter().map(OsString::from);
        let words: Vec<OsString> = words.into_iter().chain(variables).chain(recorder.iter().cloned()).collect();
        self.run(&words, program, "trapline")
    }

    fn run(&self, before: &[OsString], program: &[String], by: &str) -> Result<Vec<u8>> {
        let mut command = Command::new(&before[0]);
        command.args(&before[1..]).args(program).env_clear().envs(ENVIRONMENT.iter().copied());
        command.envs(self.more.iter().map(|(name, value)| (name, value)));
        command.current_dir(&self.folder).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        finish(command, &format!("{} under {by}", program[0]))
    }
}

fn address(printed: &[u8]) -> Result<u64> {
    let text = String::from_utf8_lossy(printed);
    text.trim().parse().with_context(|| format!("`{}` is no address", text.trim()))
}
