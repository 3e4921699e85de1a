//! Tools that read and print.

use std::{fmt::Write as _, fs, path::Path};

use trapline_testsuite::{
    run::{Command, End},
    scratch::Scratch,
    stock::Stock,
};

/// Writes a file into a folder.
fn file(folder: &Scratch, name: &str, content: &str) {
    fs::write(folder.join(name), content).expect("a folder of our own");
}

fn check(words: &[&str], folder: &Scratch) {
    Stock::of(Command::new(words, folder.path())).run();
}

fn numbers(folder: &Scratch) {
    let lines: String = (1..40_000_u32).fold(String::new(), |mut text, number| {
        let _ = writeln!(text, "{number} {}", number.wrapping_mul(2_654_435_761));
        text
    });
    file(folder, "numbers.txt", &lines);
}

#[test]
fn ls() {
    check(&["/usr/bin/ls", "-lR", "/usr/share"], &Scratch::new());
}

#[test]
fn xz() {
    let folder = Scratch::new();
    numbers(&folder);
    check(&["/usr/bin/xz", "-T2", "--block-size=100000", "-1", "-c", "numbers.txt"], &folder);
}

#[test]
fn gzip() {
    let folder = Scratch::new();
    numbers(&folder);
    check(&["/usr/bin/gzip", "-c", "numbers.txt"], &folder);
}

#[test]
fn bzip2() {
    let folder = Scratch::new();
    numbers(&folder);
    check(&["/usr/bin/bzip2", "-c", "numbers.txt"], &folder);
}

#[test]
fn sqlite3() {
    let folder = Scratch::new();
    let mut script = "create table t(a integer primary key, b text);\nbegin;\n".to_owned();
    for row in 0..10_000 {
        let _ = writeln!(script, "insert into t values({row}, 'row {}');", row * 7);
    }
    script.push_str("commit;\nselect count(*), sum(a), max(b) from t where b like '%7%';\n");
    file(&folder, "inserts.sql", &script);
    check(&["/usr/bin/sqlite3", ":memory:", ".read inserts.sql"], &folder);
}

#[test]
fn python3() {
    let folder = Scratch::new();
    file(
        &folder,
        "work.py",
        r#"
import json, re, sys, threading
data = {"numbers": list(range(2000)), "text": "x" * 100, "nested": [{"n": None, "t": True}] * 50}
text = json.dumps(data)
assert json.loads(text) == data
print(len(text), len(re.findall(r"\d+", text)), re.sub(r"(\d)(\d)", r"\2\1", text)[:40])
totals = [0] * 4
lock = threading.Lock()
def work(index):
    for number in range(5000):
        with lock:
            totals[index] += number
threads = [threading.Thread(target=work, args=(index,)) for index in range(4)]
for thread in threads: thread.start()
for thread in threads: thread.join()
print(totals)
try:
    {}["nothing"]
except KeyError as error:
    print("no", error, file=sys.stderr)
sys.exit(5)
"#,
    );
    check(&["/usr/bin/python3", "work.py"], &folder);
}

#[test]
fn perl() {
    let folder = Scratch::new();
    file(
        &folder,
        "work.pl",
        r#"my %words; $words{$_ % 97} .= "x$_" for 1 .. 20000;
my $sum = 0;
for (sort keys %words) { $sum += length $words{$_}; $sum++ while $words{$_} =~ /x1/g; }
print "$sum\n"; eval { die "thrown\n" }; print $@; $| = 1;
system("echo child"); print `echo captured`; exit 3;
"#,
    );
    check(&["/usr/bin/perl", "work.pl"], &folder);
}

#[test]
fn gawk() {
    let folder = Scratch::new();
    numbers(&folder);
    let program = r#"NR <= 8000 { sums[$1 % 10] += $2; split($0, parts) } END { for (i = 0; i < 10; i++) print i, sums[i];
        system("echo from a child"); "echo read | tr a-z A-Z" | getline line; print line; exit 2 }"#;
    check(&["/usr/bin/gawk", program, "numbers.txt"], &folder);
}

#[test]
fn git_log() {
    let folder = Scratch::new();
    let script = r#"git init -q -b main repository && cd repository
        for number in $(seq 1 30); do
            seq 1 $((number * 20)) >file; echo "$number" >"new $number"; git add -A
            GIT_AUTHOR_DATE="@$((1000000000 + number)) +0000" GIT_COMMITTER_DATE="@$((1000000000 + number)) +0000" \
                git -c user.name=A -c user.email=a@example.org commit -q -m "Change $number"
        done"#;
    let made = Command::new(["/bin/sh", "-ec", script], folder.path()).run();
    assert_eq!(made.end, End::Status(0), "{}", made.error_text());
    check(&["git", "-C", "repository", "log", "--stat", "-p"], &folder);
}

#[test]
fn bash() {
    let folder = Scratch::new();
    file(
        &folder,
        "script.sh",
        r#"set -o pipefail
square() { local number=$1; echo $((number * number)); }
for number in 1 2 3 4 5; do square $number; done | sort -n | tail -3
( cd /; pwd; exit 4 ); echo "subshell $?"
text=$(for word in a b c; do echo $word | tr a-z A-Z; done); echo "$text"
cat <(echo one) <(echo two)
trap 'echo trapped' USR1; kill -USR1 $$
( exit 9 ) & wait $!; echo "waited $?"
seq 1 500 | while read number; do sum=$((sum + number)); echo $sum; done | tail -1
false | true; echo "pipe $?"
sh -c 'kill -TERM $$'; echo "killed $?"
exit 7
"#,
    );
    check(&["/usr/bin/bash", "script.sh"], &folder);
}

/// Figures become `#`, and whatever space is around them one space.
fn without_figures(text: &str) -> String {
    let marked: String =
        text.chars().map(|char| if char.is_ascii_digit() || char == '.' { '#' } else { char }).collect();
    let words = marked.split_whitespace().map(|word| {
        let mut word = word.to_owned();
        while word.contains("##") {
            word = word.replace("##", "#");
        }
        word
    });
    words.collect::<Vec<_>>().join(" ")
}

#[test]
fn openssl_speed() {
    let words = ["/usr/bin/openssl", "speed", "-seconds", "1", "-bytes", "1024", "sha256"];
    Stock::of(Command::new(words, Path::new("/"))).normalise(without_figures).run();
}

#[test]
fn figures_are_left_out_and_nothing_else() {
    assert_eq!(without_figures("sha256   123.45k\nin 0.9s"), "sha# #k in #s");
    assert_ne!(without_figures("3 failed"), without_figures("3 done"));
}
