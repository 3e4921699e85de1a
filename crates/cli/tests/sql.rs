//! `sql`: a trace as tables.
#![cfg(target_arch = "x86_64")]

mod common;

use std::{
    collections::BTreeMap,
    fs::{self, OpenOptions},
    io::{Read as _, Write as _},
    process::{Child, ChildStdin, ChildStdout, Command, Output, Stdio},
};

use common::{Directory, write_calls, write_trace};
use serde_json::Value;
use trapline_trace::record::Event::{Enter, Exit};

fn json(directory: &Directory, query: &str) -> Vec<Vec<Value>> {
    let answer: Value = serde_json::from_str(&directory.text(&["sql", "--json", query])).expect("JSON");
    assert_eq!(answer["version"], 1);
    let row = |row: &Value| row.as_array().expect("a row").clone();
    answer["rows"].as_array().expect("rows").iter().map(row).collect()
}

fn with_input(directory: &Directory, arguments: &[&str], input: &str) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_trapline"));
    let command = directory.confine(&mut command).args(arguments);
    let mut child =
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("the command runs");
    child.stdin.take().expect("a pipe").write_all(input.as_bytes()).expect("it reads");
    child.wait_with_output().expect("it ends")
}

fn told(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

/// `main` calls `work` twice, and is still running when the trace ends.
fn small(name: &str) -> Directory {
    let directory = Directory::new(name);
    let [main, work] = [0, 1].map(|site| Enter { site });
    let events = [
        (0, main),
        (100, work),
        (300, Exit { depth: 2 }),
        (400, work),
        (450, Exit { depth: 2 }),
        (1000, work),
        (1001, Exit { depth: 2 }),
    ];
    write_trace(&directory.0.join("trapline.data"), &["main", "work", "idle"].map(str::to_owned), &events);
    directory
}

#[test]
fn calls_are_rows_with_their_times() {
    let directory = small("sql-rows");
    let rows = json(&directory, "SELECT function, depth, start_ns, duration_ns, self_ns, ending, tid, site FROM calls");
    let row = |function: &str, depth, start, duration, own, ending: &str, site| -> Vec<Value> {
        let numbers = [depth, start, duration, own].map(|number: u64| Value::from(number));
        [vec![function.into()], numbers.to_vec(), vec![ending.into(), 7.into(), Value::from(site)]].concat()
    };
    let expected = [
        row("work", 1, 100, 200, 200, "returned", 1),
        row("work", 1, 400, 50, 50, "returned", 1),
        row("work", 1, 1000, 1, 1, "returned", 1),
        row("main", 0, 0, 1001, 750, "open", 0),
    ];
    assert_eq!(rows, expected);
    assert_eq!(
        json(&directory, "SELECT function, calls FROM functions ORDER BY site"),
        [["main".into(), Value::from(1)], ["work".into(), Value::from(3)], ["idle".into(), Value::from(0)],]
    );
}

#[test]
fn conditions_and_joins_have_the_answers_that_they_have_elsewhere() {
    let directory = small("sql-conditions");
    let one = |query: &str| json(&directory, query)[0][0].clone();
    for (condition, calls) in [
        ("tid = 7", 4),
        ("tid = 8", 0),
        ("tid = '7'", 4),
        ("tid = 7.0", 4),
        ("tid = 7.5", 0),
        ("tid = NULL", 0),
        ("tid = 7 AND tid = 8", 0),
        ("tid IN (6, 7, 8)", 4),
        ("tid IN (6, 8)", 0),
        ("stream = 1 AND tid = 7", 4),
        ("stream = 1 AND tid = 8", 0),
        ("tid > 7 OR function = 'main'", 1),
    ] {
        assert_eq!(one(&format!("SELECT count(*) FROM calls WHERE {condition}")), calls, "{condition}");
        // What the table looks for itself is what SQLite finds in all rows.
        assert_eq!(
            one(&format!(
                "SELECT count(*) FROM (SELECT CAST(tid AS INTEGER) AS tid, CAST(stream AS INTEGER) AS stream, function FROM calls) WHERE {condition}"
            )),
            calls,
            "{condition}"
        );
    }
    assert_eq!(one("SELECT function FROM functions WHERE site = 1"), "work");
    assert!(json(&directory, "SELECT function FROM functions WHERE site = 3").is_empty());
    let joined = json(
        &directory,
        "SELECT f.function, t.thread, count(*) FROM calls c JOIN functions f USING (site) JOIN threads t USING (stream) GROUP BY 1, 2 ORDER BY 3",
    );
    assert_eq!(
        joined,
        [["main".into(), "prog".into(), Value::from(1)], ["work".into(), "prog".into(), Value::from(3)]]
    );
    let callers = "SELECT a.function FROM calls a JOIN calls b ON b.start_ns > a.start_ns AND b.depth = a.depth + 1 WHERE b.duration_ns = 1";
    assert_eq!(one(callers), "main");
}

#[test]
fn answers_have_three_forms() {
    let directory = small("sql-forms");
    let query = "SELECT function, duration_ns FROM calls LIMIT 2; SELECT NULL AS none, 'a,b' AS text, x'00ff' AS bytes, 0.5 AS half";
    let table = "function  duration_ns\nwork              200\nwork               50\n\nnone  text  bytes  half\n   -  a,b   00ff    0.5\n";
    assert_eq!(directory.text(&["sql", query]), table);
    let csv = "function,duration_ns\r\nwork,200\r\nwork,50\r\nnone,text,bytes,half\r\n,\"a,b\",00ff,0.5\r\n";
    assert_eq!(directory.text(&["sql", "--csv", query]), csv);
    let lines = directory.text(&["sql", "--json", query]);
    assert_eq!(
        lines,
        "{\"version\":1,\"columns\":[\"function\",\"duration_ns\"],\"rows\":[[\"work\",200],[\"work\",50]]}\n\
         {\"version\":1,\"columns\":[\"none\",\"text\",\"bytes\",\"half\"],\"rows\":[[null,\"a,b\",\"00ff\",0.5]]}\n"
    );
    for form in [["sql"].as_slice(), &["sql", "--csv"], &["sql", "--json"]] {
        let output = with_input(&directory, form, query);
        assert!(output.status.success(), "{}", told(&output));
        assert_eq!(String::from_utf8_lossy(&output.stdout), directory.text(&[form, &[query]].concat()), "from a pipe");
    }
    assert_eq!(directory.text(&["sql", "/* nothing */"]), "");
    assert_eq!(directory.text(&["sql", "SELECT 1 AS one WHERE 0"]), "one\n");
}

#[test]
fn a_table_with_more_rows_than_wait_is_whole() {
    let directory = Directory::new("sql-long");
    write_calls(&directory.0.join("trapline.data"), 12_345);
    let text = directory.text(&["sql", "SELECT start_ns FROM calls"]);
    assert_eq!(text.lines().count(), 12_346);
    assert!(text.lines().skip(1).enumerate().all(|(at, line)| line.trim() == (at * 100).to_string()));
}

/// The most memory that the command had, in kibibytes, when it begins to print what it has sorted. It waits then, for what it prints is more than a pipe holds.
fn peak_kib(directory: &Directory, query: &str) -> u64 {
    let mut command = Command::new(env!("CARGO_BIN_EXE_trapline"));
    let command = directory.confine(&mut command).args(["sql", "--csv", query]).env("SQLITE_TMPDIR", &directory.0);
    let mut child = command.stdout(Stdio::piped()).spawn().expect("the command runs");
    let mut begin = [0; 1000];
    child.stdout.as_mut().expect("a pipe").read_exact(&mut begin).expect("rows");
    let status = fs::read_to_string(format!("/proc/{}/status", child.id())).expect("it still runs");
    drop(child.stdout.take());
    assert_eq!(child.wait().expect("it ends").code(), Some(0));
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).expect("the peak");
    line.trim_end_matches("kB").trim().parse().expect("a number")
}

#[test]
fn what_is_sorted_lies_in_files_and_not_in_memory() {
    const LIMIT_KIB: u64 = 100 << 10;
    let directory = Directory::new("sql-memory");
    write_calls(&directory.0.join("trapline.data"), 600_000);
    let query = "SELECT printf('%0200d', start_ns) AS wide, count(*), sum(duration_ns) FROM calls GROUP BY wide";
    let in_files = peak_kib(&directory, query);
    assert!(in_files < LIMIT_KIB, "{in_files} KiB");
    // As a control, what it would be otherwise.
    let in_memory = peak_kib(&directory, &format!("PRAGMA temp_store = memory; {query}"));
    assert!(in_memory > LIMIT_KIB, "{in_memory} KiB");
    let left = fs::read_dir(&directory.0).expect("the folder").count();
    assert_eq!(left, 1, "files are left");
}

#[test]
fn what_is_wrong_with_a_query_is_told_with_the_tables() {
    let directory = small("sql-wrong");
    for (query, what) in [
        ("SELECT * FROM call", "no such table: call"),
        ("SELECT name FROM calls", "no such column: name"),
        ("SELEKT 1", "near \"SELEKT\": syntax error"),
    ] {
        let output = directory.trapline(&["sql", query]);
        assert_eq!((output.status.code(), output.stdout.len()), (Some(2), 0));
        let told = told(&output);
        assert!(
            told.starts_with(&format!("trapline: {what}; the tables are calls, functions, threads, losses")),
            "{told}"
        );
        let output = directory.trapline(&["sql", "--json", query]);
        let error: Value = serde_json::from_slice(&output.stderr).expect("JSON");
        assert_eq!(error["error"]["kind"], "refused");
    }
    let output = directory.trapline(&["sql", "DELETE FROM calls"]);
    assert!(output.status.code() == Some(2) && told(&output).contains("may not be modified"), "{}", told(&output));
    assert_eq!(directory.trapline(&["sql", "--json", "--csv", "SELECT 1"]).status.code(), Some(2));
}

#[test]
fn a_trace_that_is_cut_foreign_or_not_there_is_told_as_elsewhere() {
    let directory = Directory::new("sql-mishaps");
    write_calls(&directory.0.join("good.data"), 10_000);
    let bytes = fs::read(directory.0.join("good.data")).expect("the trace");
    fs::write(directory.0.join("cut.data"), &bytes[..bytes.len() * 2 / 3]).expect("a file");
    fs::write(directory.0.join("foreign.data"), "#!/bin/sh\necho no trace\n".repeat(1000)).expect("a file");
    let query = "SELECT count(*) FROM calls; SELECT count FROM losses WHERE cause = 'damaged_records'";
    let cut = directory.trapline(&["sql", "--csv", query, "-i", "cut.data"]);
    let text = String::from_utf8_lossy(&cut.stdout).into_owned();
    let count = |line: usize| text.lines().nth(line).expect("a line").parse::<u64>().expect("a number");
    assert!(cut.status.success() && told(&cut).starts_with("trapline: the trace is damaged"), "{}", told(&cut));
    let report: Value =
        serde_json::from_slice(&directory.trapline(&["report", "--json", "-i", "cut.data"]).stdout).expect("JSON");
    assert_eq!(report["functions"][0]["calls"], count(1));
    assert_eq!(report["lost"]["damaged_records"], count(3));
    assert!((1..10_000).contains(&count(1)), "{text}");
    for file in ["foreign.data", "none.data"] {
        let [sql, report] =
            [["sql", "SELECT 1", "-i", file].as_slice(), &["report", "-i", file]].map(|line| directory.trapline(line));
        assert_eq!((sql.status.code(), told(&sql)), (report.status.code(), told(&report)));
    }
    for form in ["--json", "--csv", "-i"] {
        let line = ["sql", "SELECT * FROM calls", "-i", "good.data", form, "good.data"];
        let line = if form == "-i" { &line[..4] } else { &line[..5] };
        let full = OpenOptions::new().write(true).open("/dev/full").expect("/dev/full");
        let mut command = Command::new(env!("CARGO_BIN_EXE_trapline"));
        let output = directory.confine(&mut command).args(line).stdout(full).output().expect("the command runs");
        assert_eq!(output.status.code(), Some(3));
        assert!(
            told(&output).contains("cannot write to standard output: No space left on device"),
            "{}",
            told(&output)
        );
        let (reader, writer) = std::io::pipe().expect("a pipe");
        drop(reader);
        let mut command = Command::new(env!("CARGO_BIN_EXE_trapline"));
        let output = directory.confine(&mut command).args(line).stdout(writer).output().expect("the command runs");
        assert_eq!((output.status.code(), told(&output)), (Some(0), String::new()));
    }
}

/// `trapline sql` on a terminal, which `script` makes.
struct Prompt {
    script: Child,
    keys: ChildStdin,
    screen: ChildStdout,
    /// All that was shown.
    shown: String,
    /// Behind what was awaited last.
    seen: usize,
}

impl Prompt {
    fn start(directory: &Directory, line: &str) -> Self {
        let mut command = Command::new("timeout");
        // The shell hands its place over: beside the command it would be interrupted, too, and end as one that was.
        let asked = format!("exec {} {line}", env!("CARGO_BIN_EXE_trapline"));
        let command = directory.confine(&mut command).args(["60", "script", "-qec", &asked, "/dev/null"]);
        let mut script = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().expect("script runs");
        let (keys, screen) = (script.stdin.take().expect("a pipe"), script.stdout.take().expect("a pipe"));
        Self { script, keys, screen, shown: String::new(), seen: 0 }
    }

    /// Types when something is shown behind what was awaited before. What is typed is shown, too, and control characters mean something else before there is a prompt.
    fn when(&mut self, awaited: &str, keys: &str) {
        self.seen = loop {
            if let Some(at) = self.shown[self.seen..].find(awaited) {
                break self.seen + at + awaited.len();
            }
            let mut bytes = [0; 4096];
            let read = self.screen.read(&mut bytes).expect("what the terminal shows");
            assert!(read > 0, "it ended: {}", self.shown);
            self.shown.push_str(&String::from_utf8_lossy(&bytes[..read]));
        };
        self.keys.write_all(keys.as_bytes()).expect("it reads");
    }

    /// The status, and all that was shown.
    fn end(mut self) -> (Option<i32>, String) {
        let mut rest = Vec::new();
        self.screen.read_to_end(&mut rest).expect("what the terminal shows");
        self.shown.push_str(&String::from_utf8_lossy(&rest));
        (self.script.wait().expect("it ends").code(), self.shown)
    }
}

#[test]
fn a_prompt_answers_until_its_end() {
    let directory = small("sql-prompt");
    let mut prompt = Prompt::start(&directory, "sql");
    prompt.when("sql> ", "SELECT nonsense;\n");
    prompt.when("no such column: nonsense", "");
    prompt.when("sql> ", "SELECT function, calls\n");
    prompt.when("...> ", "FROM functions WHERE calls = 3;\n");
    prompt.when("work          3", "");
    // There are no more.
    prompt.when("sql> ", "\x04");
    let (status, text) = prompt.end();
    assert_eq!(status, Some(0), "{text}");
    for part in ["Tables: calls, functions, threads, losses", "sql> ", "no such column: nonsense", "work          3"] {
        assert!(text.contains(part), "{part}: {text}");
    }
}

/// Has rows without an end.
const ENDLESS: &str = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) SELECT i AS number FROM n";

#[test]
fn an_interrupt_at_the_prompt_cancels_the_query_and_not_the_program() {
    let directory = small("sql-cancelled");
    let mut prompt = Prompt::start(&directory, "sql");
    for _ in 0..2 {
        prompt.when("sql> ", &format!("{ENDLESS};\n"));
        prompt.when("1000\r\n", "\x03");
        prompt.when("the query was cancelled", "");
    }
    prompt.when("sql> ", "SELECT 'of a', 'line\n");
    prompt.when("...> ", "\x03");
    prompt.when("sql> ", "SELECT calls AS answered FROM functions WHERE function = 'work';\n");
    prompt.when("       3\r\n", "");
    prompt.when("sql> ", "\x04");
    let (status, text) = prompt.end();
    assert_eq!((status, text.matches("the query was cancelled").count()), (Some(0), 2), "{text}");
    // As a control: without a prompt there is nobody to go on for.
    let mut alone = Prompt::start(&directory, &format!("sql --no-pager \"{ENDLESS}\""));
    alone.when("1000\r\n", "\x03");
    let (status, text) = alone.end();
    assert!(status == Some(130) && !text.contains("cancelled"), "{status:?}");
}

/// Threads that call each other's functions, recursion, and a thread that does not return from one.
const PROGRAM: &str = "\
#include <pthread.h>
#define KEEP __attribute__((noinline, noclone))
static volatile unsigned long sum;
KEEP unsigned long leaf(unsigned long n) { for (unsigned long i = 0; i < n % 50; i++) sum += i; return sum; }
KEEP unsigned long deep(unsigned long n) { return n ? deep(n - 1) + leaf(n) : leaf(1); }
KEEP void leave(void) { leaf(3); pthread_exit(0); }
KEEP void *work(void *given) { for (unsigned long i = 0; i < 1000; i++) { deep(i % 7); leaf(i); } if (given) leave(); return 0; }
int main(void) {
    pthread_t threads[4];
    for (long i = 0; i < 4; i++) pthread_create(&threads[i], 0, work, (void *)(i & 1));
    for (int i = 0; i < 4; i++) pthread_join(threads[i], 0);
    return 0;
}
";

/// What each function of a report has. By name, module and address.
fn reported(report: &Value) -> BTreeMap<(String, String, u64), Vec<Option<u64>>> {
    const KEYS: [&str; 10] =
        ["calls", "open", "total_ns", "self_ns", "sum_ns", "min_ns", "avg_ns", "max_ns", "p50_ns", "p99_ns"];
    let text = |value: &Value| value.as_str().expect("a text").to_owned();
    let functions = report["functions"].as_array().expect("a list").iter();
    let row = |function: &Value| {
        let name =
            (text(&function["name"]), text(&function["module"]), function["address"].as_u64().expect("a number"));
        (name, KEYS.map(|key| function[key].as_u64()).to_vec())
    };
    functions.map(row).collect()
}

fn asked(rows: &[Vec<Value>]) -> BTreeMap<(String, String, u64), Vec<Option<u64>>> {
    let text = |value: &Value| value.as_str().expect("a text").to_owned();
    let row = |row: &Vec<Value>| {
        let name = (text(&row[0]), text(&row[1]), row[2].as_u64().expect("a number"));
        (name, row[3..].iter().map(Value::as_u64).collect())
    };
    rows.iter().map(row).collect()
}

#[test]
fn of_a_program_with_threads_the_tables_say_what_the_report_says() {
    let directory = Directory::new("sql-threads");
    fs::write(directory.0.join("program.c"), PROGRAM).expect("a file");
    let mut gcc = Command::new("gcc");
    let gcc = gcc.args(["-O1", "-pthread", "program.c", "-o", "program"]).current_dir(&directory.0);
    assert!(gcc.status().expect("gcc is needed for this test").success());
    directory.text(&["record", "-q", "--", "./program"]);
    let report: Value = serde_json::from_str(&directory.text(&["report", "--json"])).expect("JSON");
    let report = reported(&report);
    let calls = |name: &str| report.iter().find(|(key, _)| key.0 == name).expect("a function").1[0];
    assert_eq!((calls("work"), calls("leave")), (Some(4), Some(2)));

    let functions = "SELECT function, module, address, calls, open, total_ns, self_ns, sum_ns, min_ns, avg_ns, max_ns, p50_ns, p99_ns FROM functions WHERE calls > 0";
    assert_eq!(asked(&json(&directory, functions)), report);
    // Rows round each duration down, by less than a nanosecond.
    let grouped = "SELECT function, module, address, count(*), sum(duration_ns), min(duration_ns), max(duration_ns) FROM calls GROUP BY site, function, module, address";
    let rows = asked(&json(&directory, grouped));
    let differences = |rows: &BTreeMap<(String, String, u64), Vec<Option<u64>>>| -> Vec<String> {
        let near = |a: Option<u64>, b: Option<u64>, by: u64| a.unwrap_or(0).abs_diff(b.unwrap_or(0)) <= by;
        let names = rows.keys().chain(report.keys());
        let differ = names.filter(|name| match (rows.get(*name), report.get(*name)) {
            (Some(row), Some(known)) => {
                row[0] != known[0]
                    || !near(row[1], known[4], known[0].unwrap_or(0))
                    || !near(row[2], known[5], 1)
                    || !near(row[3], known[7], 1)
            }
            _ => true,
        });
        differ.map(|name| name.0.clone()).collect()
    };
    assert_eq!(differences(&rows), Vec::<String>::new());
    // As a control, one call less of one function is found, and so is one of another thread.
    let fewer = grouped.replace("FROM calls", "FROM (SELECT * FROM calls WHERE NOT (function = 'leave' AND start_ns = (SELECT min(start_ns) FROM calls WHERE function = 'leave')))");
    assert!(differences(&asked(&json(&directory, &fewer))).contains(&"leave".to_owned()));
    let fewer =
        grouped.replace("FROM calls", "FROM calls WHERE tid <> (SELECT max(tid) FROM calls WHERE function = 'work')");
    assert!(differences(&asked(&json(&directory, &fewer))).contains(&"work".to_owned()));

    // Each thread, looked for by the table, and counted in all rows.
    let threads = json(&directory, "SELECT tid FROM threads");
    assert_eq!(threads.len(), 5);
    for thread in &threads {
        let tid = thread[0].as_u64().expect("a number");
        let one = |query: String| json(&directory, &query)[0][0].clone();
        let looked_for = one(format!("SELECT count(*) FROM calls WHERE tid = {tid}"));
        assert_eq!(looked_for, one(format!("SELECT sum(tid + 0 = {tid}) FROM calls")), "{tid}");
        assert!(looked_for.as_u64().is_some_and(|calls| calls > 0), "{tid}");
    }
    puts_rows_together_as_sqlite_does(&directory);
}

/// What the table orders, groups and looks for, beside what `SQLite` makes of rows as they come.
fn puts_rows_together_as_sqlite_does(directory: &Directory) {
    const QUERIES: [&str; 21] = [
        "SELECT function, count(*), sum(duration_ns), min(self_ns), max(start_ns) FROM calls GROUP BY function",
        "SELECT function, count(*) FROM calls GROUP BY function ORDER BY function DESC",
        "SELECT thread, tid, function, depth, avg(duration_ns) FROM calls GROUP BY tid, thread, function, depth",
        "SELECT depth, ending, count(duration_ns), count(*), total(start_ns) FROM calls GROUP BY depth, ending",
        "SELECT depth, count(*) FROM calls WHERE ending = 'returned' GROUP BY depth HAVING count(*) > 2",
        "SELECT DISTINCT function FROM calls",
        "SELECT DISTINCT function, depth FROM calls ORDER BY depth DESC, function",
        "SELECT count(DISTINCT function), count(DISTINCT tid), count(DISTINCT depth) FROM calls",
        "SELECT DISTINCT duration_ns FROM calls WHERE function = 'work'",
        "SELECT function, start_ns FROM calls WHERE function IN ('work', 'leave', 7, NULL)",
        "SELECT count(*) FROM calls WHERE function = 'WORK' COLLATE NOCASE",
        "SELECT function COLLATE NOCASE, count(*) FROM calls GROUP BY 1",
        "SELECT count(*) FROM calls WHERE function = 'leaf' OR tid = (SELECT max(tid) FROM threads)",
        "SELECT count(*) FROM calls WHERE site IN (SELECT site FROM functions WHERE function LIKE 'l%') AND tid IN (SELECT tid FROM threads)",
        "SELECT count(*) FROM calls WHERE site = '7' OR site = 7.0 OR site = 7.5",
        "SELECT f.function, count(*) FROM calls AS c JOIN functions AS f USING (site) GROUP BY f.function",
        "SELECT t.tid, c.function, count(*) FROM threads AS t JOIN calls AS c USING (stream) GROUP BY t.tid, c.function",
        "SELECT function, depth FROM calls ORDER BY function DESC, depth LIMIT 100",
        "SELECT function, max(n) FROM (SELECT function, tid, count(*) AS n FROM calls GROUP BY function, tid) GROUP BY function",
        "SELECT depth, sum(duration_ns) FILTER (WHERE function = 'leaf'), group_concat(DISTINCT function) = '' FROM calls GROUP BY depth",
        "SELECT program, host <> '', count(*) FROM calls GROUP BY program, host",
    ];
    // A limit keeps SQLite from asking the table itself.
    let plain = QUERIES.map(|query| query.replace("FROM calls", "FROM (SELECT * FROM calls LIMIT -1)"));
    let answers = |queries: &[String]| -> Vec<Value> {
        let output = with_input(directory, &["sql", "--json"], &queries.join(";\n"));
        assert!(output.status.success(), "{}", told(&output));
        let lines = String::from_utf8_lossy(&output.stdout).into_owned();
        lines.lines().map(|line| serde_json::from_str(line).expect("JSON")).collect()
    };
    let sorted = |answer: &Value| {
        let mut rows: Vec<String> = answer["rows"].as_array().expect("rows").iter().map(Value::to_string).collect();
        rows.sort();
        rows
    };
    let (ours, theirs) = (answers(&QUERIES.map(str::to_owned)), answers(&plain));
    assert_eq!((ours.len(), theirs.len()), (QUERIES.len(), QUERIES.len()));
    for (query, (ours, theirs)) in QUERIES.iter().zip(ours.iter().zip(&theirs)) {
        let is_ordered = query.contains("ORDER BY");
        assert!(if is_ordered { ours == theirs } else { sorted(ours) == sorted(theirs) }, "{query}: {ours} {theirs}");
        assert!(!sorted(ours).is_empty(), "{query}");
    }
    // As a control: it is the table that groups here, and SQLite there.
    let plans = [QUERIES[0], &plain[0]].map(|query| json(directory, &format!("EXPLAIN QUERY PLAN {query}")));
    let sorts = plans.map(|plan| plan.iter().any(|row| row[3].as_str().is_some_and(|step| step.contains("B-TREE"))));
    assert_eq!(sorts, [false, true]);
}

#[test]
fn the_queries_of_the_document_are_carried_out() {
    let directory = small("sql-document");
    let document = include_str!("../../../docs/sql.md");
    let queries: Vec<&str> =
        document.split("```sql\n").skip(1).filter_map(|part| Some(part.split_once("```")?.0)).collect();
    assert!(queries.len() >= 8, "{}", queries.len());
    for query in &queries {
        let output = with_input(&directory, &["sql", "--csv"], query);
        assert!(output.status.success(), "{query}: {}", told(&output));
        // Each has an answer with rows here, but that of what is missing and that of what is not traced, and the one that keeps.
        let rows = String::from_utf8_lossy(&output.stdout).lines().count();
        let is_empty = query.contains("losses") || query.contains("ATTACH");
        assert!(rows > 1 || is_empty, "{query}: {rows} lines");
    }
    assert!(directory.0.join("calls.db").metadata().is_ok_and(|file| file.len() > 0), "what is attached is kept");
    // The columns of the document are those that there are.
    for table in ["calls", "functions", "threads", "losses"] {
        let part = document.split_once(&format!("\n### {table}\n")).expect("its part").1;
        let part = part.split_once("\n##").expect("the next").0;
        let columns = json(&directory, &format!("SELECT name FROM pragma_table_info('{table}')"));
        assert!(!columns.is_empty());
        for column in columns {
            assert!(part.contains(&format!("`{}`", column[0].as_str().expect("a name"))), "{table}.{column:?}");
        }
    }
}
