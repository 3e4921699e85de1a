//! `html`: a report as a page. What it shows is proved in a browser, by `cargo xtask pages`.
#![cfg(target_arch = "x86_64")]

mod common;

use common::{Directory, write_calls, write_trace};
use serde_json::Value;
use trapline_trace::record::Event::{Enter, Exit};

/// The facts that a page has.
fn facts(page: &str) -> Value {
    let (_, rest) = page.split_once("id=\"facts\">").expect("facts");
    serde_json::from_str(rest.split_once("</script>").expect("an end").0).expect("JSON")
}

#[test]
fn its_numbers_are_those_of_report_and_info() {
    let directory = Directory::new("html-numbers");
    let names = ["main", "work", "</script>"].map(str::to_owned);
    let events: Vec<_> = (0..40)
        .flat_map(|round| {
            let at = round * 1000;
            [(at, Enter { site: 0 }), (at + 10, Enter { site: 1 }), (at + 20, Enter { site: 2 })].into_iter().chain([
                (at + 30 + round, Exit { depth: 3 }),
                (at + 700, Exit { depth: 2 }),
                (at + 900, Exit { depth: 1 }),
            ])
        })
        .collect();
    write_trace(&directory.0.join("trapline.data"), &names, &events);
    let output = directory.trapline(&["html"]);
    let told = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success() && told.contains("120 calls in trapline.html"), "{told}");
    let page = std::fs::read_to_string(directory.0.join("trapline.html")).expect("the page");
    let of = |arguments: &[&str]| serde_json::from_str::<Value>(&directory.text(arguments)).expect("JSON");
    let facts = facts(&page);
    assert_eq!((&facts["report"], &facts["info"]), (&of(&["report", "--json"]), &of(&["info", "--json"])));
    for (function, durations) in facts["report"]["functions"]
        .as_array()
        .expect("a list")
        .iter()
        .zip(facts["durations"].as_array().expect("a list"))
    {
        let counts = durations.as_array().expect("bins").chunks(2).filter_map(|bin| bin[1].as_u64()).sum::<u64>();
        assert_eq!(function["calls"], counts);
    }
    assert_eq!(directory.text(&["html", "-o", "-"]), page);

    // The control: a trace of other calls has other numbers.
    write_calls(&directory.0.join("other.data"), 3);
    assert_ne!(of(&["report", "--json", "-i", "other.data"]), facts["report"]);
}

#[test]
fn a_trace_without_calls_and_a_cut_one_are_shown_and_what_cannot_be_is_told() {
    let directory = Directory::new("html-mishaps");
    let trace = directory.0.join("trapline.data");
    write_trace(&trace, &["main".to_owned()], &[]);
    assert_eq!(facts(&directory.text(&["html", "-q", "-o", "-"]))["threads"], Value::Array(Vec::new()));

    write_calls(&trace, 2000);
    let whole = std::fs::read(&trace).expect("the trace");
    std::fs::write(&trace, &whole[..whole.len() - 9]).expect("a cut trace");
    let output = directory.trapline(&["html", "-o", "cut.html"]);
    assert!(output.status.success() && String::from_utf8_lossy(&output.stderr).contains("the trace "));
    let page = std::fs::read_to_string(directory.0.join("cut.html")).expect("the page");
    assert_eq!(facts(&page)["report"]["lost"]["finished"], false);

    for (arguments, status, expected) in [
        (["html", "-o", "trapline.data"], 2, "is the trace itself; name another file with -o"),
        (["html", "-i", "nothing.data"], 3, "trapline record"),
        (["html", "-o", "no/such/folder.html"], 3, "name another one with -o"),
        (["html", "--detail", "many"], 2, "--detail"),
    ] {
        let output = directory.trapline(&arguments);
        let told = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.code() == Some(status) && told.contains(expected), "{arguments:?}: {told}");
    }
}
