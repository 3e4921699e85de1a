//! `trapline stress` as its users see it: what it prints, what it finds, and with which status it ends. Beside each strategy that must lose
//! nothing stands the one that must lose calls.

use std::{
    fs,
    process::{Command, Output, Stdio},
    time::{Duration, Instant},
};

use serde_json::Value;

const TRAPLINE: &str = env!("CARGO_BIN_EXE_trapline");
const WIDTH: u64 = usize::BITS as u64;

/// Runs the command, which may take a minute at most.
fn trapline(arguments: &str) -> Output {
    Command::new("timeout")
        .args(["60", TRAPLINE])
        .args(arguments.split_whitespace())
        .output()
        .expect("timeout(1) is part of every Debian")
}

fn status(output: &Output) -> i32 {
    output.status.code().unwrap_or_else(|| panic!("ended by a signal: {output:?}"))
}

fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

/// The report of a short run, and its exit status.
fn report(options: &str) -> (Value, i32) {
    let output = trapline(&format!("stress --seconds 2 --threads 2 --json {options}"));
    let report = serde_json::from_slice(&output.stdout);
    (report.unwrap_or_else(|error| panic!("standard output is no JSON object: {error}: {output:?}")), status(&output))
}

fn count(report: &Value, key: &str) -> u64 {
    report[key].as_u64().unwrap_or_else(|| panic!("no count {key} in {report}"))
}

/// Work was done, and nothing was lost.
fn assert_clean(report: &Value, status: i32) {
    for key in ["missed", "spurious", "corrupted"] {
        assert_eq!(count(report, key), 0, "{key} in {report}");
    }
    for key in ["calls", "ops", "pokes", "batches", "traps", "held"] {
        assert_ne!(count(report, key), 0, "{key} in {report}");
    }
    assert_eq!(status, 0, "{report}");
}

#[test]
fn slots_lose_nothing() {
    let (report, status) = report("");
    assert_clean(&report, status);
    assert_eq!(report["resume"], "slots");
    assert_eq!(count(&report, "version"), 1);
    assert_eq!(count(&report, "width"), WIDTH);
    assert_eq!(count(&report, "seconds"), 2);
    assert_eq!(count(&report, "threads"), 2);
    assert_eq!(count(&report, "overflows"), 0);
    assert!(count(&report, "max_depth") >= 1, "{report}");
    assert_eq!(count(&report, "nesting"), 3, "{report}");
    let sum = |part: &str, key: &str| -> u64 {
        report[part].as_object().expect("an object").values().map(|value| count(value, key)).sum()
    };
    for part in ["contexts", "phases"] {
        assert_eq!(sum(part, "calls"), count(&report, "calls"), "{part}");
    }
    assert_eq!(sum("contexts", "ops"), count(&report, "ops"));
    assert_eq!(sum("phases", "pokes"), count(&report, "pokes"));
}

#[test]
fn skip_loses_calls_that_an_ops_had_to_see() {
    let (report, status) = report("--resume skip");
    assert_eq!(status, 1, "{report}");
    assert_ne!(count(&report, "missed"), 0, "{report}");
    assert_eq!(count(&report, "spurious") + count(&report, "corrupted"), 0, "{report}");
    for steady in ["nop", "call", "list"] {
        assert_eq!(count(&report["phases"][steady], "missed"), 0, "between changes no int3 is met: {report}");
    }
}

#[test]
fn too_few_slots_overflow_and_lose_nothing() {
    let (report, status) = report("--slots 1");
    assert_clean(&report, status);
    assert_ne!(count(&report, "overflows"), 0, "{report}");
    assert_eq!(count(&report, "max_depth"), 1, "{report}");
}

#[cfg(target_arch = "x86_64")]
#[test]
fn push_and_r11_lose_nothing() {
    for strategy in ["push", "r11"] {
        let (report, status) = report(&format!("--resume {strategy}"));
        assert_clean(&report, status);
        assert_eq!(report["resume"], strategy);
        assert_eq!(count(&report, "max_depth"), 0, "no slot is used");
    }
}

#[cfg(target_arch = "x86")]
#[test]
fn push_and_r11_are_refused_and_say_why() {
    for (strategy, why) in [("push", "FP_XSTATE_MAGIC2"), ("r11", "no r11")] {
        let output = trapline(&format!("stress --seconds 1 --resume {strategy} --json"));
        assert_eq!(status(&output), 2, "{output:?}");
        assert!(output.stdout.is_empty(), "{output:?}");
        let message = stderr(&output);
        assert!(message.contains(why) && message.contains("use slots"), "{message}");
    }
}

#[test]
fn the_tables_show_every_count() {
    let output = trapline("stress --seconds 1 --threads 2");
    let text = String::from_utf8_lossy(&output.stdout);
    assert_eq!((status(&output), stderr(&output).as_str()), (0, ""), "{text}");
    for row in [
        "calls",
        "ops invocations",
        "missed",
        "pokes",
        "traps",
        "greatest slot depth",
        "overflows",
        "corrupted",
        "normal",
        "signal 1",
        "signal 3",
        "nop->call",
        "call->list",
        "list->list",
        "list->call",
        "call->nop",
    ] {
        assert!(text.lines().any(|line| line.starts_with(row)), "no row {row}:\n{text}");
    }
}

#[test]
fn no_page_is_writable_and_executable_at_any_moment() {
    let mut child = Command::new(TRAPLINE)
        .args(["stress", "--seconds", "2", "--threads", "2"])
        .stdout(Stdio::null())
        .spawn()
        .expect("it was built");
    let maps = format!("/proc/{}/maps", child.id());
    let deadline = Instant::now() + Duration::from_mins(1);
    let (mut looks, mut trampolines) = (0, 0);
    let outcome = loop {
        if let Some(status) = child.try_wait().expect("it is our child") {
            break status;
        }
        if Instant::now() > deadline {
            let _ = child.kill();
        }
        // Gone is gone: then there is nothing to see, and the next look at the child says so.
        let text = fs::read_to_string(&maps).unwrap_or_default();
        for line in text.lines() {
            let mut fields = line.split_whitespace();
            let access = fields.nth(1).unwrap_or_default();
            assert!(!(access.contains('w') && access.contains('x')), "{line}");
            // Behind the access come offset, device and inode; a name only where a file or the kernel gave it.
            trampolines += usize::from(access.contains('x') && fields.nth(3).is_none());
        }
        looks += usize::from(!text.is_empty());
    };
    assert!(outcome.success(), "{outcome}");
    assert!(looks > 10 && trampolines > 0, "{looks} looks, and {trampolines} times memory for trampolines in them");
}

/// At 32 bit the words of the environment are addresses of code as good as any: here one in each 64 bytes of where executables are put, and what
/// they map.
#[test]
#[cfg(unix)]
fn an_environment_full_of_addresses_keeps_no_code_alive() {
    use std::os::unix::ffi::OsStringExt;
    let pages = (0x0056_5501_u32..0x0056_7000).filter(|page| page & 0xff != 0);
    let words = pages.flat_map(|page| [0x01, 0x41, 0x81, 0xc1].map(|low| (page << 8 | low).to_le_bytes()));
    let value = std::ffi::OsString::from_vec(words.flatten().collect());
    let status = Command::new(TRAPLINE)
        .args(["stress", "--seconds", "1", "--threads", "2"])
        .env("ADDRESSES", value)
        .stdout(Stdio::null())
        .status()
        .expect("it was built");
    assert!(status.success(), "{status}");
}

#[test]
fn options_out_of_range_are_refused_with_the_range() {
    for (options, range) in [
        ("--seconds 0", "1..=3600"),
        ("--seconds 3601", "1..=3600"),
        ("--seconds soon", "invalid digit"),
        ("--threads 0", "1..=1024"),
        ("--threads 1025", "1..=1024"),
        ("--slots 17", "0..=16"),
        ("--resume magic", "slots, push, r11, skip"),
        ("--forever", "--forever"),
    ] {
        let output = trapline(&format!("stress {options}"));
        assert_eq!(status(&output), 2, "{options}: {output:?}");
        assert!(output.stdout.is_empty(), "{options}: {output:?}");
        assert!(stderr(&output).contains(range), "{options}: {}", stderr(&output));
    }
}

#[test]
fn the_help_shows_an_example() {
    let output = trapline("stress --help");
    assert_eq!(status(&output), 0);
    let told = String::from_utf8_lossy(&output.stdout);
    assert!(told.contains("trapline stress --seconds 10 --threads 4"), "{told}");
}
