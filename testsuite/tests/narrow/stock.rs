//! What Debian ships for i386, with and without trapline, with all functions of all libraries.

use std::{fmt::Write as _, fs, path::Path};

use trapline_testsuite::{debian, run::Command, scratch::Scratch, stock::Stock};

fn check(program: &str, arguments: &[&str], folder: &Scratch) {
    let root = debian::i386(Path::new(env!("CARGO_TARGET_TMPDIR")));
    Stock::of(Command::new(root.command(program, arguments), folder.path())).run();
}

fn numbers(folder: &Scratch) {
    let lines: String = (1..20_000_u32).fold(String::new(), |mut text, number| {
        let _ = writeln!(text, "{number} {}", number.wrapping_mul(2_654_435_761));
        text
    });
    fs::write(folder.join("numbers.txt"), lines).expect("a folder of our own");
}

#[test]
fn bash() {
    let script =
        "i=0; while [ $i -lt 60 ]; do i=$((i + 1)); x=$(echo $i | (read y; echo $y)); done; echo $i $x; (exit 7)";
    check("bash", &["--norc", "-c", script], &Scratch::new());
}

#[test]
fn gawk() {
    let folder = Scratch::new();
    numbers(&folder);
    let program =
        "{ sum += $2; seen[$2 % 1000]++ } END { print sum, length(seen), substr(sprintf(\"%.3f\", sum / NR), 1, 9) }";
    check("gawk", &[program, "numbers.txt"], &folder);
}

#[test]
fn perl() {
    let script = "my %h; for (1 .. 20000) { $h{$_ % 100} .= 'x' if /[13]$/ } print join(',', map { length($h{$_} // '') } sort keys %h), \"\\n\"; eval { die 'no' }; print $@";
    check("perl", &["-e", script], &Scratch::new());
}

#[test]
fn python3() {
    let folder = Scratch::new();
    let script = "import json, re, threading
results = []
def work(times):
    text = ''.join(re.sub('[0-9]', '', json.dumps({'a': number, 'b': [number] * 3})) for number in range(times))
    results.append(len(text))
threads = [threading.Thread(target=work, args=(300,)) for _ in range(3)]
[thread.start() for thread in threads]
[thread.join() for thread in threads]
print(results)
try:
    int('x')
except ValueError as error:
    print(error)
";
    fs::write(folder.join("work.py"), script).expect("a folder of our own");
    check("python3.11", &["-B", "work.py"], &folder);
}

#[test]
fn sqlite3() {
    let script = "create table t(a integer primary key, b text); \
                  with recursive n(x) as (select 1 union all select x + 1 from n where x < 4000) insert into t select x, 'row ' || (x * 7) from n; \
                  select count(*), sum(a), max(b) from t where b like '%7%'; select a % 10, avg(length(b)) from t group by 1;";
    check("sqlite3", &[":memory:", script], &Scratch::new());
}

#[test]
fn xz() {
    let folder = Scratch::new();
    numbers(&folder);
    check("xz", &["-T2", "--block-size=100000", "-1", "-c", "numbers.txt"], &folder);
}
