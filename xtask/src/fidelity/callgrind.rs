//! Reads what callgrind writes: how often each instruction was executed.
//!
//! Owns [`counts`]. The format is described in valgrind's manual ("Callgrind Format Specification"); we ask for it without any compression, with the
//! positions `instr line` and the one event `Ir`. Addresses are those of the object's file.

use anyhow::{Context, Result, ensure};

use super::compare::Calls;

/// Executions by object and address. `module` says under which name an object counts, if it does.
///
/// # Errors
/// The text is not of the form that was asked for.
pub(super) fn counts(text: &str, module: impl Fn(&str) -> Option<String>) -> Result<Calls> {
    ensure!(text.lines().any(|line| line == "positions: instr line"), "callgrind's file has other positions");
    ensure!(text.lines().any(|line| line.trim_end() == "events: Ir"), "callgrind's file has other events");
    let mut counts = Calls::new();
    let mut current = None;
    // The line behind `calls=` has the cost of what was called, not of the instruction.
    let mut is_inclusive = false;
    for line in text.lines() {
        if let Some(object) = line.strip_prefix("ob=") {
            current = module(object.trim());
        } else if line.starts_with("calls=") {
            is_inclusive = true;
        } else if let Some(rest) = line.strip_prefix("0x") {
            if std::mem::take(&mut is_inclusive) {
                continue;
            }
            let Some(module) = &current else { continue };
            let mut words = rest.split_ascii_whitespace();
            let address = words.next().and_then(|word| u64::from_str_radix(word, 16).ok());
            let count = words.nth(1).and_then(|word| word.parse::<u64>().ok());
            let (address, count) =
                address.zip(count).with_context(|| format!("callgrind's file has a line `{line}`"))?;
            *counts.entry((module.clone(), address)).or_default() += count;
        }
    }
    Ok(counts)
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
        assert_eq!(counts, expected.into_iter().collect());
    }

    #[test]
    fn another_form_is_refused() {
        assert!(counts("positions: line\nevents: Ir\n", only_main).is_err());
        assert!(counts("positions: instr line\nevents: Ir Dr\n", only_main).is_err());
        assert!(counts(&format!("{HEAD}ob=/bin/main\n0x10 5\n"), only_main).is_err());
    }
}
