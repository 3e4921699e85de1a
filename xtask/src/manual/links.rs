//! What leads from page to page.
//!
//! Owns [`targets`], the links of a text, and the test that every page of `docs` is in the manual and every link leads to something. Invariant: what is a link elsewhere in the world is not looked at.

/// The manual's list of pages.
pub(crate) const SUMMARY: &str = "SUMMARY.md";

/// The files that a text links to, each with its line. Code has no links.
pub(crate) fn targets(text: &str) -> impl Iterator<Item = (usize, &str)> {
    let mut is_code = false;
    let prose = (1..).zip(text.lines()).filter(move |(_, line)| {
        let is_fence = line.trim_start().starts_with("```");
        is_code ^= is_fence;
        !is_code && !is_fence
    });
    let links = prose.flat_map(|(number, line)| {
        let inner = line.split("](").skip(1).filter_map(|rest| rest.split_once(')'));
        inner.map(move |(target, _)| (number, target))
    });
    links.filter(|(_, target)| !target.contains("://"))
}

#[cfg(test)]
mod tests {
    use std::{
        collections::BTreeSet,
        fs,
        path::{Path, PathBuf},
    };

    use super::*;
    use crate::workspace_root;

    /// As web pages make them of titles.
    fn anchors(text: &str) -> BTreeSet<String> {
        let titles = text.lines().filter(|line| line.starts_with('#'));
        let anchor = |title: &str| -> String {
            let kept = title.trim_start_matches('#').trim().to_lowercase();
            let kept = kept.chars().filter(|c| c.is_alphanumeric() || matches!(c, ' ' | '-' | '_'));
            kept.map(|c| if c == ' ' { '-' } else { c }).collect()
        };
        titles.map(anchor).collect()
    }

    /// Links of a file that lead nowhere.
    fn broken(file: &Path, text: &str) -> Vec<String> {
        let folder = file.parent().expect("a folder");
        let docs = workspace_root().join("docs");
        let is_broken = |target: &str| {
            let (path, anchor) = target.split_once('#').unwrap_or((target, ""));
            let to = if path.is_empty() { file.to_path_buf() } else { folder.join(path) };
            let has_anchor = || match (fs::read_to_string(&to), path.is_empty()) {
                (_, true) => anchors(text).contains(anchor),
                (Ok(other), false) => anchors(&other).contains(anchor),
                (Err(_), false) => false,
            };
            // A page of the book leads to no file beside it.
            let leaves = file.starts_with(&docs) && !path.is_empty() && path.starts_with("..");
            leaves || !to.exists() || !anchor.is_empty() && !has_anchor()
        };
        let links = targets(text).filter(|(_, target)| is_broken(target));
        links.map(|(line, target)| format!("{}:{line}: {target}", file.display())).collect()
    }

    #[test]
    fn every_page_is_in_the_manual_and_every_link_leads_somewhere() {
        let root = workspace_root();
        let docs = root.join("docs");
        let summary = fs::read_to_string(docs.join(SUMMARY)).expect("the summary");
        let listed: BTreeSet<PathBuf> = targets(&summary).map(|(_, target)| docs.join(target)).collect();
        let files = fs::read_dir(&docs).expect("docs").map(|entry| entry.expect("an entry").path());
        let pages: BTreeSet<PathBuf> = files.filter(|path| path.extension().is_some_and(|end| end == "md")).collect();
        let missing: Vec<&PathBuf> =
            pages.iter().filter(|page| !page.ends_with(SUMMARY) && !listed.contains(*page)).collect();
        assert!(missing.is_empty(), "not in the manual: {missing:?}");
        let also = ["README.md", "ARCHITECTURE.md", "CONTRIBUTING.md"].map(|name| root.join(name));
        for file in pages.iter().chain(&also) {
            let text = fs::read_to_string(file).expect("a page");
            assert_eq!(broken(file, &text), Vec::<String>::new());
        }
        // As a control.
        let wrong = "[a](none.md) [b](SUMMARY.md#none) [c](#there) [d](../README.md)\n\n# Here\n";
        assert_eq!(broken(&docs.join("wrong.md"), wrong).len(), 4);
    }

    #[test]
    fn links_are_found_in_prose_only() {
        let text = "See [a](a.md) and ![b](b.svg).\n```c\nx[i](j)\n```\n[out](https://example.org/x)\n[c](c.md#d)\n";
        assert_eq!(targets(text).collect::<Vec<_>>(), [(1, "a.md"), (1, "b.svg"), (6, "c.md#d")]);
    }
}
