//! A page of the manual, as its commands.
//!
//! Owns [`Page`] and what in a page's text means what: a block ` ```sh ` is followed; a block ` ```text ` behind it is shown; `<!-- before` begins commands that make ready what the page takes for
//! granted, and that its readers do not see; `<!-- not followed: REASON -->` in front of a block keeps it from being followed. Pure: text in, commands out.

/// What a page says to do, in its order.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Page {
    pub(crate) blocks: Vec<Block>,
    /// Blocks that cannot be followed everywhere: line, and why.
    pub(crate) left_out: Vec<(usize, String)>,
}

/// Commands that belong together.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Block {
    /// Of the page, where it begins.
    pub(crate) line: usize,
    /// Lines for a shell.
    pub(crate) commands: String,
    /// What the page shows of the output: lines with their numbers in the page.
    pub(crate) shown: Vec<(usize, String)>,
}

const BEFORE: &str = "<!-- before";
const NOT_FOLLOWED: &str = "<!-- not followed: ";

/// Reads a page.
///
/// # Errors
/// A block or a comment has no end: a sentence for the author.
pub(crate) fn parse(text: &str) -> Result<Page, String> {
    let mut page = Page::default();
    let mut lines = (1..).zip(text.lines());
    let mut reason = None;
    while let Some((line, text)) = lines.next() {
        if let Some(why) = text.strip_prefix(NOT_FOLLOWED) {
            reason = Some(why.trim_end_matches("-->").trim().to_owned());
        } else if text == BEFORE {
            let commands = until(&mut lines, "-->", line)?;
            page.blocks.push(Block { line, commands: joined(&commands), shown: Vec::new() });
        } else if let Some(kind) = text.trim_start().strip_prefix("```") {
            let inner = until(&mut lines, "```", line)?;
            match (kind, reason.take()) {
                ("sh", Some(why)) => page.left_out.push((line, why)),
                ("sh", None) => page.blocks.push(Block { line, commands: joined(&inner), shown: Vec::new() }),
                ("text", None) => {
                    // In front of all commands it is a picture.
                    if let Some(block) = page.blocks.last_mut() {
                        block.shown.extend(inner);
                    }
                }
                _ => {}
            }
        }
    }
    Ok(page)
}

fn until<'a>(
    lines: &mut impl Iterator<Item = (usize, &'a str)>,
    end: &str,
    begun: usize,
) -> Result<Vec<(usize, String)>, String> {
    let mut inner = Vec::new();
    for (line, text) in lines {
        if text.trim() == end {
            return Ok(inner);
        }
        inner.push((line, text.to_owned()));
    }
    Err(format!("line {begun}: what begins here has no end"))
}

fn joined(lines: &[(usize, String)]) -> String {
    lines.iter().flat_map(|(_, text)| [text.as_str(), "\n"]).collect()
}

/// The lines that are shown and not printed. Numbers differ from run to run, and so do their units and the room between words; `...` stands for anything.
pub(crate) fn missing<'a>(shown: &'a [(usize, String)], printed: &str) -> Vec<&'a (usize, String)> {
    let printed: Vec<String> = printed.lines().map(masked).collect();
    let is_there = |text: &str| {
        let text = masked(text);
        let mut parts = text.split("...");
        let first = parts.next().unwrap_or_default();
        let rest: Vec<&str> = parts.collect();
        printed.iter().any(|line| match rest.split_last() {
            None => *line == first,
            Some((last, between)) => {
                let mut left = line.strip_prefix(first);
                for part in between {
                    left = left.and_then(|left| left.find(part).map(|at| &left[at + part.len()..]));
                }
                left.is_some_and(|left| left.ends_with(last))
            }
        })
    };
    shown.iter().filter(|(_, text)| !text.trim().is_empty() && !is_there(text)).collect()
}

/// The line with its numbers made equal.
fn masked(line: &str) -> String {
    const UNITS: [&str; 8] = ["ns", "us", "ms", "s", "KiB", "MiB", "GiB", "k"];
    let words = line.split_whitespace().map(|word| {
        let mut masked = String::new();
        let mut rest = word;
        while let Some(at) = rest.find(|c: char| c.is_ascii_digit()) {
            masked.push_str(&rest[..at]);
            masked.push('#');
            let end = rest[at..].find(|c: char| !c.is_ascii_digit() && c != '.').map_or(rest.len(), |end| at + end);
            rest = &rest[end..];
            let unit = UNITS.iter().find(|unit| {
                rest.strip_prefix(**unit).is_some_and(|behind| !behind.starts_with(|c: char| c.is_alphanumeric()))
            });
            rest = unit.map_or(rest, |unit| &rest[unit.len()..]);
        }
        masked + rest
    });
    // Units that stand apart belong to their numbers.
    let words: Vec<String> = words.filter(|word| !UNITS.contains(&word.as_str())).collect();
    words.join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEXT: &str = "\
# Title

<!-- before
cc x.c
-->

```sh
run one
run two
```

It says:

```text
3 calls of 12.5us  in one
```

<!-- not followed: it needs root -->
```sh
run as root
```

```rust
fn main() {}
```
";

    #[test]
    fn a_page_is_its_commands_and_what_they_show() {
        let page = parse(TEXT).expect("a page");
        let commands: Vec<(usize, &str)> =
            page.blocks.iter().map(|block| (block.line, block.commands.as_str())).collect();
        assert_eq!(commands, [(3, "cc x.c\n"), (7, "run one\nrun two\n")]);
        assert_eq!(page.blocks[1].shown, [(15, "3 calls of 12.5us  in one".to_owned())]);
        assert_eq!(page.left_out, [(19, "it needs root".to_owned())]);
        assert!(parse("```sh\nrun").is_err());
        assert!(parse("<!-- before\nrun").is_err());
        assert_eq!(parse("```text\na picture\n```"), Ok(Page::default()));
    }

    #[test]
    fn numbers_may_differ_and_words_may_not() {
        let shown = |text: &str| vec![(1, text.to_owned())];
        for (text, printed) in [
            ("3 calls of 12.5us  in one", "nothing\n  17 calls of 1.03ms in one\n"),
            ("[trapline: ... in trapline.data]", "[trapline: 12 events of 3 processes, 5 KiB in trapline.data]"),
            ("   1   2.5s main [bash] (1 open)", "1 413.96ms main [bash] (1 open)"),
            ("", "anything"),
        ] {
            assert!(missing(&shown(text), printed).is_empty(), "{text}");
        }
        for (text, printed) in [
            ("3 calls", "3 cells"),
            ("3 calls", "3 calls more"),
            ("main ... [bash]", "main 17 [dash]"),
            ("main [bash]", "main\n[bash]"),
        ] {
            assert_eq!(missing(&shown(text), printed).len(), 1, "{text}");
        }
    }
}
