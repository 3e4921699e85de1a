//! A second count, where callgrind's and the trace's differ: by a breakpoint of gdb's, on the processor.
//!
//! Owns [`executions`]. Callgrind computes what a program computes, but not on the processor: what depends on that, as on how the x87 rounds, can take another
//! turn there. gdb stops the program at each execution of an instruction, which is slow, exact, and the real run.

use std::fs;

use anyhow::{Context, Result};
use object::{Object, ObjectKind};

use super::{Folder, Ready, surroundings::Surroundings};

/// So often a breakpoint may be hit without stopping: more than any function is called.
const WITHOUT_END: u64 = 2_000_000_000;

/// How often the processor executes the instruction at `address` of the main executable; `None` if that is loaded elsewhere than its file says.
pub(super) fn executions(program: &Ready, folder: &Folder, around: &Surroundings, address: u64) -> Result<Option<u64>> {
    let bytes = fs::read(&program.command[0]).with_context(|| format!("reading {}", program.command[0]))?;
    let kind = object::File::parse(&*bytes).context("reading the program's headers")?.kind();
    if kind != ObjectKind::Executable {
        return Ok(None);
    }
    let script = folder.path.join("count.gdb");
    // What gdb would add to the program's environment, itself and by the shell that starts it, could be seen.
    let lines = format!(
        "set pagination off\nset startup-with-shell off\nunset environment LINES\nunset environment COLUMNS\n\
         break *{address:#x}\nignore 1 {WITHOUT_END}\nrun\ninfo breakpoints\n"
    );
    fs::write(&script, lines).with_context(|| format!("writing {}", script.display()))?;
    let mut words: Vec<_> = ["/usr/bin/gdb", "-q", "-batch", "-nx", "-x"].map(Into::into).to_vec();
    words.extend([script.into(), "--args".into()]);
    let printed = around.execute(&words, &program.command)?;
    let printed = String::from_utf8_lossy(&printed);
    let count = printed.lines().find_map(|line| line.trim().strip_prefix("breakpoint already hit "));
    let count = count.and_then(|text| text.split_whitespace().next()?.parse().ok());
    Ok(Some(count.unwrap_or(0)))
}
