//! `diff` and `graph`, on traces that are written here.

mod common;

use common::{Directory, write_trace};
use serde_json::Value;
use trapline_trace::record::Event::{self, Enter, Exit};

/// Functions of the made-up program, and their usual times.
const TIMES: [u64; 12] = [900, 1500, 700, 3000, 800, 2100, 400, 1200, 5000, 650, 1000, 300];

/// The one that a test slows down.
const SLOWED: usize = 4;

/// A run of the program: `rounds` of calls of all functions, which take their usual times more or less, by what `seed` makes of it.
struct Run {
    seed: u64,
    rounds: u64,
    /// In percent, of the time of [`SLOWED`].
    slowed: u64,
    /// In percent, of all times: another clock rate.
    rate: u64,
    /// Of this function, each call is made twice.
    twice: Option<usize>,
    /// A function that has another name.
    renamed: Option<usize>,
}

const USUAL: Run = Run { seed: 1, rounds: 500, slowed: 100, rate: 100, twice: None, renamed: None };

impl Run {
    fn write(&self, directory: &Directory, name: &str) {
        let mut state = self.seed;
        // xorshift, whose numbers have no pattern that matters here.
        let mut random = move || {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            state
        };
        let (mut tsc, mut events) = (1000, Vec::<(u64, Event)>::new());
        for _ in 0..self.rounds {
            for (function, usual) in TIMES.iter().enumerate() {
                for _ in 0..if self.twice == Some(function) { 2 } else { 1 } {
                    let slowed = if function == SLOWED { self.slowed } else { 100 };
                    // Up to a fifth more, and now and then an interruption.
                    let interrupted = if random() % 500 == 0 { 40_000 } else { 0 };
                    let time = (usual + random() % (usual / 5)) * slowed / 100 + interrupted;
                    let site = u32::try_from(function).expect("few");
                    events.push((tsc, Enter { site }));
                    tsc += time * self.rate / 100;
                    events.push((tsc, Exit { depth: 1 }));
                    tsc += 10;
                }
            }
        }
        let name_of =
            |function| if self.renamed == Some(function) { "other".to_owned() } else { format!("f{function}") };
        let names: Vec<String> = (0..TIMES.len()).map(name_of).collect();
        write_trace(&directory.0.join(name), &names, &events);
    }
}

/// What `diff` says of two runs.
fn diff(directory: &Directory, before: &Run, after: &Run) -> Value {
    before.write(directory, "before.data");
    after.write(directory, "after.data");
    serde_json::from_str(&directory.text(&["diff", "before.data", "after.data", "--json"])).expect("JSON")
}

fn names(list: &Value) -> Vec<&str> {
    list.as_array().expect("a list").iter().map(|entry| entry["name"].as_str().expect("a name")).collect()
}

const LISTS: [&str; 6] = ["slower", "faster", "more_calls", "fewer_calls", "new", "gone"];

#[test]
fn two_runs_of_the_same_program_differ_in_nothing() {
    let directory = Directory::new("diff-same");
    for seed in 2..12 {
        let answer = diff(&directory, &USUAL, &Run { seed, ..USUAL });
        for list in LISTS {
            assert!(names(&answer[list]).is_empty(), "seed {seed}, {list}: {answer}");
        }
        assert_eq!((&answer["version"], &answer["compared"]), (&1.into(), &12.into()));
    }
    let text = directory.text(&["diff", "before.data", "after.data"]);
    assert!(text.contains("no difference that is sure and larger than 5 %"), "{text}");
}

#[test]
fn a_function_that_is_a_tenth_slower_is_the_first_and_only_one_named() {
    let directory = Directory::new("diff-slow");
    for seed in 2..12 {
        let answer = diff(&directory, &USUAL, &Run { seed, slowed: 110, ..USUAL });
        assert_eq!(names(&answer["slower"]), ["f4"], "seed {seed}: {answer}");
        assert!(LISTS[1..].iter().all(|list| names(&answer[*list]).is_empty()), "seed {seed}: {answer}");
        let change = answer["slower"][0]["change_percent"].as_f64().expect("a number");
        assert!((7.0..14.0).contains(&change), "{change}");
        // And the other way round it is faster.
        let answer = diff(&directory, &Run { seed, slowed: 110, ..USUAL }, &USUAL);
        assert_eq!((names(&answer["slower"]).len(), names(&answer["faster"])), (0, vec!["f4"]));
    }
    let status = |arguments: &[&str]| directory.trapline(arguments).status.code();
    assert_eq!(status(&["diff", "before.data", "after.data", "--check"]), Some(0));
    assert_eq!(status(&["diff", "after.data", "before.data", "--check"]), Some(1));
    assert_eq!(status(&["diff", "after.data", "before.data", "--check", "--min-change", "20"]), Some(0));
}

#[test]
fn what_all_functions_have_in_common_is_told_once() {
    let directory = Directory::new("diff-rate");
    let answer = diff(&directory, &USUAL, &Run { seed: 3, rate: 130, slowed: 110, ..USUAL });
    let common = answer["common_percent"].as_f64().expect("a number");
    assert!((29.0..31.0).contains(&common), "{common}");
    assert_eq!((names(&answer["slower"]), names(&answer["faster"]).len()), (vec!["f4"], 0));
}

#[test]
fn calls_that_are_more_or_new_or_gone_are_counted() {
    let directory = Directory::new("diff-calls");
    let answer = diff(&directory, &USUAL, &Run { seed: 3, twice: Some(7), renamed: Some(2), ..USUAL });
    let lists = LISTS.map(|list| names(&answer[list]));
    assert_eq!(lists, [vec![], vec![], vec!["f7"], vec![], vec!["other"], vec!["f2"]]);
    let more = &answer["more_calls"][0];
    assert_eq!((&more["before"], &more["after"], &more["other_has_it"]), (&500.into(), &1000.into(), &true.into()));
    assert_eq!(answer["gone"][0]["other_has_it"], false);
    let text = directory.text(&["diff", "before.data", "after.data"]);
    assert!(text.contains("f2 [prog] (the other program has no such function)"), "{text}");
}

#[test]
fn functions_that_were_called_seldom_are_not_compared() {
    let directory = Directory::new("diff-seldom");
    let few = Run { rounds: 10, ..USUAL };
    let answer = diff(&directory, &few, &Run { seed: 3, slowed: 300, ..few });
    assert_eq!((names(&answer["slower"]).len(), &answer["seldom"]), (0, &12.into()));
}

/// `main` calls `work` twice and `rest` once; `work` calls itself once, and `leaf` from within; `rest` calls `leaf`.
fn write_calls(directory: &Directory) {
    let [main, work, leaf, rest] = [0, 1, 2, 3].map(|site| Enter { site });
    let events = [
        (0, main),
        (100, work),
        (200, work),
        (300, leaf),
        (350, Exit { depth: 4 }),
        (400, Exit { depth: 3 }),
        (500, Exit { depth: 2 }),
        (600, work),
        (700, Exit { depth: 2 }),
        (800, rest),
        (810, leaf),
        (840, Exit { depth: 3 }),
        (850, Exit { depth: 2 }),
        (1000, Exit { depth: 1 }),
    ];
    let names = ["main", "work", "leaf", "rest"].map(str::to_owned);
    write_trace(&directory.0.join("trapline.data"), &names, &events);
}

#[test]
fn graph_shows_callers_and_callees_with_their_parts() {
    let directory = Directory::new("graph");
    write_calls(&directory);
    let graph = |arguments: &[&str]| -> Value {
        serde_json::from_str(&directory.text(&[&["graph", "--json"], arguments].concat())).expect("JSON")
    };
    let work = graph(&["work"]);
    let work = &work["functions"][0];
    // Of the call of itself, calls count and time does not.
    assert_eq!((&work["calls"], &work["total_ns"], &work["self_ns"]), (&3.into(), &500.into(), &450.into()));
    let [by_main, by_itself] = [&work["callers"][0], &work["callers"][1]];
    assert_eq!((&by_main["name"], &by_main["calls"], &by_main["total_ns"]), (&"main".into(), &2.into(), &500.into()));
    assert_eq!(
        (&by_itself["name"], &by_itself["calls"], &by_itself["total_ns"]),
        (&"work".into(), &1.into(), &0.into())
    );
    assert_eq!(by_main["callers"][0]["name"], Value::Null);
    let itself = &work["callees"][0];
    assert_eq!((&itself["name"], &itself["calls"], &itself["total_ns"]), (&"work".into(), &1.into(), &200.into()));
    assert_eq!((&itself["callees"][0]["name"], &itself["callees"][0]["total_ns"]), (&"leaf".into(), &50.into()));
    assert_eq!(graph(&["*"])["functions"].as_array().map(Vec::len), Some(4));
    assert_eq!(graph(&["main", "-D", "1"])["functions"][0]["callees"][0]["callees"], Value::Array(Vec::new()));
}

#[test]
fn graph_is_told_in_lines_with_their_levels() {
    let directory = Directory::new("graph-text");
    write_calls(&directory);
    let told = directory.text(&["graph", "leaf"]);
    let expected = "\
leaf [prog]: 2 calls, 80ns in all, 80ns itself

is called by
       calls       time  function
           1       50ns  work
           1       50ns    work
           1       50ns      main
           1       50ns        (nobody who was recorded)
           1       30ns  rest
           1       30ns    main
           1       30ns      (nobody who was recorded)

calls nothing that was recorded
";
    assert_eq!(told, expected);
    let most = directory.text(&["graph", "main", "--min", "40"]);
    assert!(most.contains("  work\n") && !most.contains("rest"), "{most}");
}

#[test]
fn graph_names_similar_functions_if_there_is_none() {
    let directory = Directory::new("graph-none");
    write_calls(&directory);
    let output = directory.trapline(&["graph", "wrok"]);
    let told = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(3));
    let expected = "trapline: no function was called whose name matches `wrok`; functions of the trace with a similar name: work\n";
    assert_eq!(told, expected);
}
