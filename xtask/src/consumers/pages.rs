//! `cargo xtask pages`: the page of `trapline html`, in Chromium.
//!
//! [`check`] writes the page of a program with several threads, and has `pages.mjs` use it as people do; [`measure`] has `pages-measure.mjs` open one of ten million calls, and reads Chromium's own trace of it. Negative controls: pages
//! that are wrong in one thing each ([`CONTROLS`]), which the check of that thing has to find. Invariant: the numbers that the page is compared with are `trapline report`'s, and nothing that the page has was taken for them.

use std::{
    fs,
    path::{Path, PathBuf},
    process::{Command, ExitCode},
};

use anyhow::{Context, Result, ensure};
use serde_json::Value;
use trapline_trace::{Meta, Writer};

use super::{
    Folder,
    install::{self, Tools, output},
    record,
};
use crate::{
    fidelity::{self, Build},
    packages,
};

/// The script's checks that find what is wrong with a page, how it is made wrong, by which text instead of which, and which.
const CONTROLS: [(&str, &str, &str, &str); 4] = [
    ("numbers", "a call too many in the table", "textContent: isTime ? formatDuration(known[key])", ""),
    (
        "requests",
        "a page that asks for a picture",
        "</footer>",
        "</footer><img alt=\"\" src=\"http://127.0.0.1:9/a.png\">",
    ),
    (
        "selection",
        "graphs that do not follow the selection",
        "  isDim(index) {\n",
        "  isDim(index) {\n    return false;\n",
    ),
    ("themes", "words that are too pale", "  --quiet: #5b6167;", "  --quiet: #8f959b;"),
];

/// Checks the page, all of it or what is named.
pub(crate) fn check(names: &[String]) -> Result<ExitCode> {
    packages::ensure(&[("/usr/bin/xz", "xz-utils")])?;
    let (tools, trapline, folder) =
        (Tools::for_tool("pages")?, fidelity::build_trapline(Build::Test)?, Folder::create()?);
    let trace = record(&trapline, &folder.0)?;
    let page = write_page(&trapline, &trace)?;
    let report = folder.0.join("report.json");
    let mut command = Command::new(&trapline);
    fs::write(&report, output(command.args(["report", "--json", "-i"]).arg(&trace), "trapline report")?)
        .with_context(|| format!("writing {}", report.display()))?;
    let empty = folder.0.join("empty.data");
    Writer::create(&empty, &Meta::default())?.finish()?;
    let empty = write_page(&trapline, &empty)?;

    let asked = |page: &Path, names: &[&str]| -> Result<Vec<(String, Option<String>)>> {
        let mut command = tools.node_script("pages.mjs");
        command.arg(page).arg(&report).arg(&empty).args(names);
        checks(&output(&command, "Chromium")?)
    };
    let names: Vec<&str> = names.iter().map(String::as_str).collect();
    let results = asked(&page, &names)?;
    ensure!(!results.is_empty(), "no check is called {}", names.join(" or "));
    let mut is_good = true;
    for (name, failure) in &results {
        is_good &= failure.is_none();
        println!("{name:<14} {}", failure.as_deref().unwrap_or("as it should be"));
    }
    for (name, what, from, to) in CONTROLS {
        if !results.iter().any(|(done, _)| done == name) {
            continue;
        }
        let wrong = folder.0.join(format!("wrong-{name}.html"));
        fs::write(&wrong, spoilt(&fs::read_to_string(&page)?, name, from, to)?)
            .with_context(|| format!("writing {}", wrong.display()))?;
        let found = asked(&wrong, &[name])?.into_iter().find_map(|(_, failure)| failure);
        is_good &= found.is_some();
        let word = found.map_or_else(|| "NOT FOUND".to_owned(), |failure| format!("found: {failure}"));
        println!("{name:<14} control, {what}: {word}");
    }
    Ok(if is_good { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// The page, with one thing wrong.
fn spoilt(page: &str, name: &str, from: &str, to: &str) -> Result<String> {
    ensure!(page.contains(from), "the control of {name} finds nothing to spoil");
    if name != "numbers" {
        // A policy would keep the request from being made.
        let page = if name == "requests" {
            page.replacen("default-src 'none';", "", 1).replace("img-src data:", "img-src *")
        } else {
            page.to_owned()
        };
        return Ok(page.replacen(from, to, 1));
    }
    let (before, rest) = page.split_once("id=\"facts\">").context("the page has no facts")?;
    let (facts, behind) = rest.split_once("</script>").context("the facts have no end")?;
    let mut facts: Value = serde_json::from_str(facts)?;
    let functions = facts["report"]["functions"].as_array_mut().context("no functions")?;
    let middle = functions.len() / 2;
    let calls = functions[middle]["calls"].as_u64().context("no calls")?;
    functions[middle]["calls"] = (calls + 1).into();
    let facts = facts.to_string().replace('<', "\\u003c");
    Ok(format!("{before}id=\"facts\">{facts}</script>{behind}"))
}

/// Opens a page of ten million calls, and moves its timeline.
pub(crate) fn measure() -> Result<ExitCode> {
    /// What is compressed makes six calls a byte.
    const INPUT_BYTES: usize = 1_720_000;
    packages::ensure(&[("/usr/bin/xz", "xz-utils")])?;
    let (tools, trapline, folder) =
        (Tools::for_tool("pages")?, fidelity::build_trapline(Build::Release)?, Folder::create()?);
    let input = folder.0.join("input");
    // A linear congruence's upper bits.
    let numbers = std::iter::successors(Some(1_u32), |number| Some(number.wrapping_mul(1_664_525).wrapping_add(1)));
    let noise: Vec<u8> = numbers.map(|number| number.to_be_bytes()[0]).take(INPUT_BYTES).collect();
    fs::write(&input, noise).with_context(|| format!("writing {}", input.display()))?;
    let trace = folder.0.join("large.data");
    let mut command = Command::new(&trapline);
    command.args(["record", "--quiet", "--lib", "liblzma.so*", "-o"]).arg(&trace);
    command.args(["--", "/usr/bin/xz", "-T3", "--block-size=256KiB", "-1", "-k", "-c"]).arg(&input);
    output(&command, "trapline record")?;
    let start = std::time::Instant::now();
    let page = write_page(&trapline, &trace)?;
    println!("written in {:.1} s: {} MB", start.elapsed().as_secs_f64(), fs::metadata(&page)?.len() / 1_000_000);
    let mut command = tools.node_script("pages-measure.mjs");
    print!("{}", output(command.arg(&page), "Chromium")?);
    Ok(ExitCode::SUCCESS)
}

/// Writes the page of a trace beside it.
pub(super) fn write_page(trapline: &Path, trace: &Path) -> Result<PathBuf> {
    let page = trace.with_extension("html");
    let mut command = Command::new(trapline);
    install::output(command.args(["html", "--quiet", "-i"]).arg(trace).arg("-o").arg(&page), "trapline html")?;
    Ok(page)
}

/// What the script found: names of checks, and how they failed.
fn checks(text: &str) -> Result<Vec<(String, Option<String>)>> {
    let found: Value = serde_json::from_str(text).context("no JSON came back")?;
    let word = |value: &Value| value.as_str().map(str::to_owned);
    let checks = found["checks"].as_array().context("no checks came back")?.iter();
    checks.map(|check| Ok((word(&check["name"]).context("a check has no name")?, word(&check["failure"])))).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_spoilt_page_has_another_number() {
        let page = "<script id=\"facts\">{\"report\":{\"functions\":[{\"calls\":7}]}}</script>textContent: isTime ? formatDuration(known[key])";
        let wrong = spoilt(page, "numbers", CONTROLS[0].2, "").expect("a page");
        assert_eq!(wrong, page.replace("\"calls\":7", "\"calls\":8"));
        assert!(spoilt("", "themes", "--quiet", "").is_err());
    }

    #[test]
    fn what_the_script_found_is_read() {
        let text = "{\"checks\":[{\"name\":\"search\",\"failure\":null},{\"name\":\"flame\",\"failure\":\"so\"}]}";
        let expected = [("search".to_owned(), None), ("flame".to_owned(), Some("so".to_owned()))];
        assert_eq!(checks(text).expect("checks"), expected);
    }
}
