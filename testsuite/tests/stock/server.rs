//! A server under load.

use std::{ffi::OsString, fs};

use trapline_testsuite::{
    run::{Command, End, Outcome, wait_for},
    scratch::Scratch,
    stock,
    transparency::VARIANTS,
    trapline,
};

const REQUESTS: &str = "5000";

/// The server's program; it is told by its name that it is to be that.
const SERVER: &str = "/usr/bin/redis-check-rdb";

/// Starts a server behind `before`, loads it, and asks it what has arrived. Returns the answers, and how the server ended.
fn load(folder: &Scratch, before: &[OsString]) -> (String, Outcome) {
    let link = folder.join("redis-server");
    if !link.exists() {
        std::os::unix::fs::symlink(SERVER, &link).expect("a folder of our own");
    }
    let socket = folder.join("socket");
    let words = ["./redis-server", "--port", "0", "--unixsocket", "socket", "--save", "", "--appendonly", "no"];
    let server = Command::new(words, folder.path()).behind(before).start();
    wait_for(&socket);
    let client = |words: &[&str]| Command::new(words, folder.path()).run();
    let tests = ["-t", "ping,set,get,incr,lpush,rpush,sadd,hset,lrange_100"];
    let benchmark = [&["/usr/bin/redis-benchmark", "-s", "socket", "-c", "20", "-n", REQUESTS, "--csv"], &tests[..]];
    let loaded = client(&benchmark.concat());
    assert_eq!(loaded.end, End::Status(0), "{}", loaded.error_text());
    // The first of each line is the test's name, the others are figures.
    let mut answers: String = loaded
        .text()
        .lines()
        .filter_map(|line| line.split(',').next())
        .flat_map(|name| [name, "\n"])
        .map(str::to_owned)
        .collect();
    for question in
        [["get", "counter:__rand_int__"], ["llen", "mylist"], ["scard", "myset"], ["strlen", "key:__rand_int__"]]
    {
        answers += &client(&[&["/usr/bin/redis-cli", "-s", "socket"], &question[..]].concat()).text();
    }
    client(&["/usr/bin/redis-cli", "-s", "socket", "shutdown", "nosave"]);
    let outcome = server.finish();
    assert!(!socket.exists(), "{}", outcome.text());
    (answers, outcome)
}

#[test]
fn redis_answers_every_request() {
    let folder = Scratch::new();
    let (bare_answers, bare) = load(&folder, &[]);
    assert!(bare_answers.contains("LRANGE_100") && bare_answers.contains(&format!("\n{REQUESTS}\n")), "{bare_answers}");
    for (variant, options) in VARIANTS {
        let trace = folder.join("trace");
        let (answers, outcome) = load(&folder, &trapline::record(&trace, options));
        assert_eq!(answers, bare_answers, "{variant}");
        assert_eq!(outcome.end, bare.end, "{variant}: {}", outcome.error_text());
        assert_eq!(stock::of_trace(&trace), Ok(Vec::new()), "{variant}");
        fs::remove_file(&trace).expect("the trace");
    }
}
