//! The page itself, from its first line to its last.
//!
//! Owns [`Sheet`]. The sources in `page/` stand in it as they are; data stands in elements that browsers do not execute: facts as JSON, and bytes in base64, in *pages* of some hundred kilobytes, so that
//! nobody has to look at more than he wants to see. Scripts come before the timeline's data, which may be long, so that everything else is there while that is read.

use std::io::{self, Write};

use base64::{Engine as _, engine::general_purpose::STANDARD};
use serde_json::Value;

use crate::target::Stream;

/// The markup, with the places of what stands in it.
const MARKUP: &str = include_str!("page/page.html");

const STYLE: &str = include_str!("page/style.css");

/// One scope, in this order.
const SCRIPTS: [&str; 12] = [
    include_str!("page/format.js"),
    include_str!("page/data.js"),
    include_str!("page/store.js"),
    include_str!("page/color.js"),
    include_str!("page/summary.js"),
    include_str!("page/table.js"),
    include_str!("page/details.js"),
    include_str!("page/surface.js"),
    include_str!("page/stacks.js"),
    include_str!("page/flame.js"),
    include_str!("page/blocks.js"),
    include_str!("page/timeline.js"),
];

/// Starts all of it.
const MAIN: &str = include_str!("page/main.js");

/// Bytes on a page before the next one begins.
const PAGE_BYTES: usize = 3 << 18;

/// See the module's text.
pub(super) struct Sheet {
    output: Stream,
    page: Vec<u8>,
    pages: u64,
    tail: &'static str,
}

/// Where bytes are. Offsets are multiples of three, so that their base64 begins with a character.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Place {
    pub(super) page: u64,
    pub(super) offset: u64,
    pub(super) len: u64,
}

impl Sheet {
    /// Writes everything that comes before the timeline: page 0 has the stacks.
    pub(super) fn begin(mut output: Stream, facts: &Value, stacks: &[u8]) -> io::Result<Self> {
        let (head, rest) = parted(MARKUP, "/* style */");
        let (body, rest) = parted(rest, "<!-- facts -->");
        let (between, tail) = parted(rest, "<!-- data -->");
        for text in [head, STYLE, body] {
            output.write_all(text.as_bytes())?;
        }
        element(&mut output, "facts", &escaped(facts))?;
        let mut sheet = Self { output, page: Vec::new(), pages: 0, tail };
        sheet.put(stacks)?;
        sheet.turn()?;
        sheet.output.write_all(between.as_bytes())?;
        sheet.output.write_all(b"<script>\n(() => {\n'use strict';\n")?;
        for script in SCRIPTS.iter().chain([&MAIN]) {
            sheet.output.write_all(script.as_bytes())?;
        }
        sheet.output.write_all(b"})();\n</script>\n")?;
        Ok(sheet)
    }

    /// Writes some bytes.
    pub(super) fn put(&mut self, bytes: &[u8]) -> io::Result<Place> {
        if self.page.len() >= PAGE_BYTES {
            self.turn()?;
        }
        self.page.resize(self.page.len().next_multiple_of(3), 0);
        let place = Place { page: self.pages, offset: self.page.len() as u64, len: bytes.len() as u64 };
        self.page.extend_from_slice(bytes);
        Ok(place)
    }

    /// Writes the directory of the timeline, and the rest.
    pub(super) fn end(mut self, directory: &Value) -> io::Result<()> {
        self.turn()?;
        element(&mut self.output, "blocks", &escaped(directory))?;
        self.output.write_all(self.tail.as_bytes())?;
        self.output.flush()
    }

    fn turn(&mut self) -> io::Result<()> {
        element(&mut self.output, &format!("data-{}", self.pages), &STANDARD.encode(&self.page))?;
        self.page.clear();
        self.pages += 1;
        Ok(())
    }
}

/// Data under a name.
fn element(output: &mut Stream, id: &str, text: &str) -> io::Result<()> {
    writeln!(output, "<script type=\"text/plain\" id=\"{id}\">{text}</script>")
}

/// JSON that does not end its element, whatever names there are. A `<` is part of a string always.
fn escaped(value: &Value) -> String {
    value.to_string().replace('<', "\\u003c")
}

/// What comes before a mark, and what comes behind it.
fn parted(text: &'static str, mark: &str) -> (&'static str, &'static str) {
    text.split_once(mark).unwrap_or((text, ""))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sources_have_their_marks_and_fetch_nothing() {
        let at = ["/* style */", "<!-- facts -->", "<!-- data -->"].map(|mark| MARKUP.find(mark).expect(mark));
        assert!(at.is_sorted());
        for text in SCRIPTS.iter().chain([&MARKUP, &STYLE, &MAIN]) {
            for word in [
                "http:",
                "https:",
                "@import",
                "url(",
                "fetch(",
                "XMLHttpRequest",
                "import(",
                "</script>\n(",
                "src=",
                "WebSocket",
            ] {
                assert!(!text.contains(word), "{word}");
            }
        }
        for script in SCRIPTS.iter().chain([&MAIN]) {
            assert!(!script.contains("</script") && !script.contains("<!--"));
        }
    }

    #[test]
    fn no_name_ends_its_element() {
        let value = serde_json::json!({ "name": "</script><script>alert(1)</script>" });
        let text = escaped(&value);
        assert!(!text.contains('<'));
        assert_eq!(serde_json::from_str::<Value>(&text).expect("JSON"), value);
    }
}
