//! The services.

use std::{
    env, fs,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
};

use trapline_testsuite::{
    program::{Optimised, Program},
    run::{self, Command, End, wait_for},
    scratch::Scratch,
    snapshot::{Own, Snapshot},
    trapline,
    web::get,
};

use super::{Recording, check, code};

/// What a command prints that has to succeed.
fn text(words: &[&str], folder: &Path) -> String {
    let outcome = Command::new(words, folder).run();
    assert_eq!(outcome.end, End::Status(0), "{words:?}: {}", outcome.error_text());
    outcome.text()
}

#[test]
fn redis() {
    const REQUESTS: u64 = 4000;
    let scratch = Scratch::new();
    // It is told by its name that it is to be a server.
    std::os::unix::fs::symlink("/usr/bin/redis-check-rdb", scratch.join("redis-server")).expect("a folder of our own");
    let words = ["./redis-server", "--port", "0", "--unixsocket", "socket", "--save", "", "--appendonly", "no"];
    let server = Command::new(words, scratch.path()).start();
    wait_for(&scratch.join("socket"));
    let ask = |words: &[&str]| text(&[&["/usr/bin/redis-cli", "-s", "socket"], words].concat(), scratch.path());
    let requests = REQUESTS.to_string();
    let mut rounds = 0;
    let load = || {
        let benchmark = ["/usr/bin/redis-benchmark", "-s", "socket", "-c", "20", "-n", &requests, "-t", "set,get,incr"];
        text(&[&benchmark[..], &["--csv"]].concat(), scratch.path());
        rounds += 1;
        let count: u64 = ask(&["get", "counter:__rand_int__"]).trim().parse().expect("a count");
        assert_eq!(count, rounds * REQUESTS, "every request counts, and once");
    };
    check("redis-server", server.pid, &Recording::new(&scratch, &[]), load);
    Command::new(["/usr/bin/redis-cli", "-s", "socket", "shutdown", "nosave"], scratch.path()).run();
    assert_eq!(server.finish().end, End::Status(0));
}

#[test]
fn python() {
    let scratch = Scratch::new();
    let content: Vec<u8> = (0..50_000_u32).flat_map(u32::to_le_bytes).collect();
    fs::write(scratch.join("file"), &content).expect("a folder of our own");
    let script = "exec python3 -u -m http.server 0 --bind 127.0.0.1 >log 2>/dev/null";
    let server = Command::new(["/bin/sh", "-c", script], scratch.path()).start();
    let log = scratch.join("log");
    wait_for(&log);
    let port = || {
        let text = fs::read_to_string(&log).unwrap_or_default();
        text.split_once(" port ").and_then(|(_, rest)| rest.split(' ').next()?.parse().ok())
    };
    let port = run::wait_some(&"its port", port);
    let load = || {
        for _ in 0..50 {
            assert!(get(port, "/file") == content, "another file arrived");
        }
    };
    check("python3 -m http.server", server.pid, &Recording::new(&scratch, &[]), load);
}

#[test]
fn rust() {
    let scratch = Scratch::new();
    let words = Program::of(&["http_server.rs"]).build(Optimised::Yes, scratch.path());
    let server = Command::new(words, scratch.path()).start();
    let file = scratch.join("port");
    wait_for(&file);
    let port: u16 = fs::read_to_string(&file).expect("its port").parse().expect("a number");
    let load = || {
        std::thread::scope(|scope| {
            for first in 0..4 {
                scope.spawn(move || {
                    for number in (first..200).step_by(4) {
                        let sum: u64 = number * (number + 1) / 2;
                        assert_eq!(get(port, &format!("/{number}")), sum.to_string().as_bytes());
                    }
                });
            }
        });
    };
    check("a server in Rust", server.pid, &Recording::new(&scratch, &[]), load);
}

#[test]
fn sqlite_in_the_middle_of_a_statement() {
    const ROWS: u64 = 8_000_000;
    let scratch = Scratch::new();
    let numbers = format!("with recursive n(x) as (select 1 union all select x + 1 from n where x < {ROWS})");
    let script = format!(".once begun\nselect 1;\n{numbers} select count(*), sum(x) from n;\n");
    let service = Command::new(["sqlite3", ":memory:"], scratch.path()).input(script).start();
    wait_for(&scratch.join("begun"));
    let (before, code_before) = (Snapshot::of(service.pid), code(service.pid));
    let recording = Recording::new(&scratch, &["--lib", "libsqlite3.so*"]);
    recording.finish("sqlite3", recording.start(service.pid));
    assert_eq!(code(service.pid), code_before, "or the statement is too short");
    assert_eq!(Snapshot::of(service.pid).complaints(&before, Own::Everything), Vec::<String>::new());
    let outcome = service.finish();
    assert_eq!(outcome.text(), format!("{ROWS}|{}\n", ROWS * (ROWS + 1) / 2), "{}", outcome.error_text());
    assert_eq!(outcome.end, End::Status(0));
}

/// Where the database's programs are: Debian keeps several versions side by side.
fn postgresql() -> Option<PathBuf> {
    let versions = fs::read_dir("/usr/lib/postgresql").ok()?;
    let folders = versions.filter_map(|entry| Some(entry.ok()?.path().join("bin")));
    let found = folders.into_iter().find(|folder| folder.join("pgbench").exists() && folder.join("initdb").exists());
    assert!(found.is_some() || env::var_os("CI").is_none(), "under CI, PostgreSQL is installed");
    if found.is_none() {
        eprintln!("left out: install postgresql to try this");
    }
    found
}

#[test]
fn a_backend_of_postgresql() {
    const NOBODY: [&str; 4] = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"];
    let Some(programs) = postgresql() else { return };
    let scratch = Scratch::new();
    // It does not run as root.
    let is_root = std::os::unix::fs::MetadataExt::uid(&fs::metadata("/proc/self").expect("proc")) == 0;
    let before: &[&str] = if is_root { &NOBODY } else { &[] };
    fs::set_permissions(scratch.path(), fs::Permissions::from_mode(0o777)).expect("a folder of our own");
    fs::copy(trapline::path(), scratch.join("trapline")).expect("a copy of the command");
    let program = |name: &str| programs.join(name).to_str().expect("a plain name").to_owned();
    let with = |name: &str, options: &[&str]| {
        let (program, mut words) = (program(name), before.to_vec());
        words.push(&program);
        words.extend(options);
        Command::new(words, scratch.path())
    };
    let done = |name: &str, options: &[&str]| {
        let outcome = with(name, options).run();
        assert_eq!(outcome.end, End::Status(0), "{name}: {}{}", outcome.text(), outcome.error_text());
        outcome.text()
    };
    let folder = scratch.path().to_str().expect("a plain name");
    done("initdb", &["-D", "data", "-A", "trust", "-U", "tester", "--no-sync"]);
    let server = with("postgres", &["-D", "data", "-k", folder, "-h", "", "-F"]).start();
    let client = ["-h", folder, "-U", "tester", "postgres"];
    let is_ready = || (with("pg_isready", &client[..4]).run().end == End::Status(0)).then_some(());
    run::wait_some(&"the server", is_ready);
    done("pgbench", &[&["-i", "-q"], &client[..]].concat());
    // One client that stays: its backend is recorded. Clients that look at tables first are gone soon.
    let balances = "select (select sum(abalance) from pgbench_accounts) = (select sum(bbalance) from pgbench_branches), count(*) from pgbench_history";
    let bench =
        with("pgbench", &[&["-n", "-c", "1", "-T", "600"], &client[..]].concat()).env("PGAPPNAME", "stays").start();
    let backend = || {
        let list = done(
            "psql",
            &[
                &[
                    "-A",
                    "-t",
                    "-c",
                    "select pid from pg_stat_activity where application_name = 'stays' and query like 'UPDATE%'",
                ],
                &client[..],
            ]
            .concat(),
        );
        list.trim().parse::<u32>().ok()
    };
    let backend = run::wait_some(&"a backend", backend);
    let trapline = scratch.join("trapline").into_os_string();
    let recording =
        Recording { before: before.iter().map(Into::into).collect(), trapline, ..Recording::new(&scratch, &[]) };
    // What comes between is the load of other clients.
    let load = || {
        let told = done("pgbench", &[&["-n", "-c", "2", "-t", "50"], &client[..]].concat());
        assert!(told.contains("number of failed transactions: 0 "), "{told}");
    };
    check("a backend of PostgreSQL", backend, &recording, load);
    run::signal("INT", &bench.pid.to_string());
    drop(bench);
    let answer = done("psql", &[&["-A", "-t", "-c", balances], &client[..]].concat());
    assert!(answer.starts_with("t|"), "{answer}");
    run::signal("INT", &server.pid.to_string());
    let outcome = server.finish();
    assert_eq!(outcome.end, End::Status(0), "{}", outcome.error_text());
    assert!(!outcome.error_text().contains("PANIC") && !outcome.error_text().contains("terminated by signal"));
}
