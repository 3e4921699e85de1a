//! Reads what callgrind writes: how often each instruction was executed, and how often it was jumped to from where.
//!
//! Owns [`counts`]. The format is described in valgrind's manual ("Callgrind Format Specification"); we ask for it without any compression, with the
//! positions `instr line`, the one event `Ir`, and jumps. Addresses are those of the object's file.

use std::{collections::BTreeMap, ops::Range};

use anyhow::{Context, Result, ensure};

use super::compare::Calls;

/// What the file says of instructions, by object and address.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Counts {
    /// Executions.
    pub(super) executed: Calls,
    /// Jumps to an instruction from others of its object: from which, and how often.
    jumps: BTreeMap<(String, u64), Vec<(u64, u64)>>,
}

impl Counts {
    /// How often an instruction was jumped to from within a range of addresses.
    pub(super) fn jumps(&self, place: &(String, u64), from: &Range<u64>) -> u64 {
        let jumps = self.jumps.get(place).into_iter().flatten();
        jumps.filter(|(source, _)| from.contains(source)).map(|(_, count)| count).sum()
    }
}

/// What the next line with a position belongs to.
enum Next {
    /// It has its own cost.
    Own,
    /// It has the cost of what was called.
    Called,
    /// It is where a jump is: how often it is taken, and where to.
    Jump(u64, u64),
}

/// Reads the counts. `module` says under which name an object counts, if it does.
///
/// # Errors
/// The text is not of the form that was asked for.
pub(super) fn counts(text: &str, module: impl Fn(&str) -> Option<String>) -> Result<Counts> {
    ensure!(text.lines().any(|line| line == "positions: instr line"), "callgrind's file has other positions");
    ensure!(text.lines().any(|line| line.trim_end() == "events: Ir"), "callgrind's file has other events");
    let mut counts = Counts::default();
    let mut current = None;
    let mut next = Next::Own;
    for line in text.lines() {
        let unclear = || format!("callgrind's file has a line `{line}`");
        if let Some(object) = line.strip_prefix("ob=") {
            current = module(object.trim());
        } else if line.starts_with("calls=") {
            next = Next::Called;
        } else if let Some(jump) = line.strip_prefix("jump=").or_else(|| line.strip_prefix("jcnd=")) {
            // A conditional jump has behind a slash how often it was executed.
            let mut words = jump.split_ascii_whitespace();
            let taken = words.next().and_then(|word| word.split('/').next()?.parse().ok());
            let (taken, target) = taken.zip(words.next().and_then(address)).with_context(unclear)?;
            next = Next::Jump(taken, target);
        } else if line.starts_with("0x") {
            let kind = std::mem::replace(&mut next, Next::Own);
            let Some(module) = &current else { continue };
            let mut words = line.split_ascii_whitespace();
            let at = words.next().and_then(address).with_context(unclear)?;
            match kind {
                Next::Own => {
                    let count = words.nth(1).and_then(|word| word.parse::<u64>().ok()).with_context(unclear)?;
                    *counts.executed.entry((module.clone(), at)).or_default() += count;
                }
                Next::Jump(taken, target) => {
                    counts.jumps.entry((module.clone(), target)).or_default().push((at, taken));
                }
                Next::Called => {}
            }
        }
    }
    Ok(counts)
}

fn address(word: &str) -> Option<u64> {
    u64::from_str_radix(word.strip_prefix("0x")?, 16).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    const HEAD: &str = "positions: instr line\nevents: Ir\n\n";

    fn only_main(object: &str) -> Option<String> {
        (object == "/bin/main").then(|| "main".to_owned())
    }

    #[test]
    fn lines_of_the_same_instruction_add_up_and_called_costs_are_left_out() {
        let text = format!(
            "{HEAD}ob=/bin/main\nfn=f\n0x10 1 3\n0x14 0 3\ncob=/lib/other\ncfn=g\ncalls=3 0x999 0 \n0x14 0 4000\n\n\
             ob=/lib/other\nfn=g\n0x10 0 70\n\nob=/bin/main\nfn=h\n0x10 5 2\n"
        );
        let counts = counts(&text, only_main).expect("a good file");
        let expected = [(("main".to_owned(), 0x10), 5), (("main".to_owned(), 0x14), 3)];
        assert_eq!(counts.executed, expected.into_iter().collect());
    }

    #[test]
    fn jumps_are_told_by_source_and_are_no_executions() {
        let text = format!(
            "{HEAD}ob=/bin/main\nfn=f\n0x10 0 9\n0x14 0 9\njcnd=4/9 0x10 0 \n0x14 0 \n0x16 0 5\njump=3 0x10 0 \n0x16 0 \n\n\
             fn=g\n0x30 0 2\njump=2 0x10 0 \n0x30 0 \n"
        );
        let counts = counts(&text, only_main).expect("a good file");
        let place = ("main".to_owned(), 0x10);
        assert_eq!(counts.jumps(&place, &(0x10..0x18)), 7);
        assert_eq!(counts.jumps(&place, &(0..u64::MAX)), 9);
        assert_eq!(counts.jumps(&("main".to_owned(), 0x14), &(0..u64::MAX)), 0);
        let executed = [(0x10, 9), (0x14, 9), (0x16, 5), (0x30, 2)];
        let executed = executed.into_iter().map(|(address, count)| (("main".to_owned(), address), count));
        assert_eq!(counts.executed, executed.collect());
    }

    #[test]
    fn another_form_is_refused() {
        assert!(counts("positions: line\nevents: Ir\n", only_main).is_err());
        assert!(counts("positions: instr line\nevents: Ir Dr\n", only_main).is_err());
        assert!(counts(&format!("{HEAD}ob=/bin/main\n0x10 5\n"), only_main).is_err());
        assert!(counts(&format!("{HEAD}ob=/bin/main\njump=x 0x10 0\n0x10 5\n"), only_main).is_err());
    }
}
