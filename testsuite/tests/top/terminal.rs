//! On a real terminal, which tmux is.

use std::{fs, path::Path};

use trapline_testsuite::{
    program::{Optimised, Program},
    run,
    scratch::Scratch,
    snapshot::{Own, Snapshot},
    terminal::Terminal,
    trace::Report,
    trapline,
};

/// The command is over, and the shell waits.
fn is_over(path: &Path) -> impl Fn(&str) -> bool + '_ {
    move |screen| {
        path.exists() && screen.trim_end().lines().last().is_some_and(|line| line.starts_with(Terminal::PROMPT))
    }
}

#[test]
fn it_is_driven_on_a_terminal_and_leaves_it_as_it_was() {
    let scratch = Scratch::new();
    let words = Program::of(&["attached.cpp"]).build(Optimised::Yes, scratch.path());
    let target = run::Command::new(words.iter().cloned().chain(["calls".into(), "2".into()]), scratch.path()).start();
    run::wait_for(&scratch.join("ready"));
    let untouched = Snapshot::of(target.pid);
    // Nothing is left of what has come into the process; while it is counted in, something is there.
    let complaints = || Snapshot::of(target.pid).complaints(&untouched, Own::Nothing);
    let assert_left = |when: &str| run::wait_until(&format!("nothing is left {when}"), || complaints().is_empty());
    let terminal = Terminal::new(scratch.path(), (80, 24));
    let before = terminal.settings("before");
    let command = trapline::path().display().to_string();
    terminal.line(&format!("{command} top --delay 0.1 --sort name -p {}; echo $? > status", target.pid));
    let row = |screen: &str| screen.lines().nth(2).unwrap_or_default().to_owned();
    let screen = terminal.wait_for("a row", |screen| screen.contains("[attached"));
    assert!(screen.contains("calls/s") && screen.contains("q leave"), "{screen}");
    let found = complaints();
    assert!(["its code is changed", "was not mapped"].iter().all(|what| found.concat().contains(what)), "{found:?}");
    // A search, and all again.
    terminal.line("/no such name");
    terminal.wait_for("no row", |screen| !screen.contains("[attached"));
    terminal.key("Escape");
    terminal.wait_for("rows again", |screen| screen.contains("[attached"));
    // Counting is switched off, and on again: nothing comes meanwhile.
    terminal.line("/LEAF");
    terminal.wait_for("one row", |screen| row(screen).contains(" leaf [") && !screen.contains("deeper"));
    let has_calls = |screen: &str| !row(screen).trim_start().starts_with("0 ");
    terminal.wait_for("calls", has_calls);
    terminal.key("Down");
    terminal.key("Space");
    terminal.wait_for("nothing more", |screen| row(screen).contains(" off: leaf [") && !has_calls(screen));
    terminal.key("Space");
    terminal.wait_for("calls again", |screen| row(screen).contains(" leaf [") && has_calls(screen));
    terminal.key("Escape");
    terminal.wait_for("all rows", |screen| screen.contains(" deeper ["));
    // A function that calls itself is recorded.
    terminal.line("/DEEPER");
    terminal.wait_for("its row", |screen| row(screen).contains(" deeper [") && !screen.contains(" leaf ["));
    terminal.key("Down");
    terminal.key("r");
    terminal.wait_for("a recording", |screen| screen.contains("recording deeper for ten seconds"));
    terminal.key("Escape");
    terminal.wait_for("all rows", |screen| screen.contains(" leaf ["));
    // Another key would clear what is said then.
    terminal.wait_for("the end of the recording", |screen| screen.contains(" calls are in "));
    // Modules, help, another size.
    terminal.key("m");
    terminal.wait_for("modules", |screen| row(screen).contains("attached") && !row(screen).contains('['));
    terminal.key("m");
    terminal.key("?");
    terminal.wait_for("help", |screen| screen.contains("any key goes back"));
    terminal.key("x");
    terminal.wait_for("no help", |screen| !screen.contains("any key goes back"));
    for (width, height) in [("100", 10), ("80", 24)] {
        terminal.tmux(&["resize-window", "-x", width, "-y", &height.to_string()]);
        let is_last = |line: &str| line.starts_with("q leave");
        // A key that comes with another size at once would be read with the next key only (crossterm).
        terminal.wait_for("the last line", |screen| screen.lines().nth(height - 1).is_some_and(is_last));
    }
    let recorded = Report::read(&scratch.join("trapline.data")).expect("a trace");
    let names: Vec<&str> = recorded.calls.keys().map(String::as_str).collect();
    assert_eq!((names, recorded.losses()), (vec!["deeper"], Vec::new()), "{recorded:?}");
    assert!(recorded.calls["deeper"] > 21, "{recorded:?}");
    terminal.key("q");
    terminal.wait_for("the shell", is_over(&scratch.join("status")));
    assert_eq!(fs::read_to_string(scratch.join("status")).expect("a status"), "0\n");
    assert_eq!(terminal.settings("after"), before);
    assert_left("after `q`");
    // A signal leaves it as well.
    fs::remove_file(scratch.join("status")).expect("it is there");
    terminal.line(&format!("sh -c 'echo $$ > number; exec {command} top -p {}'; echo $? > status", target.pid));
    terminal.wait_for("a row", |screen| screen.contains("[attached"));
    run::wait_for(&scratch.join("number"));
    let number = fs::read_to_string(scratch.join("number")).expect("a number");
    run::signal("TERM", number.trim());
    terminal.wait_for("the shell", is_over(&scratch.join("status")));
    assert_eq!(terminal.settings("at_last"), before);
    assert_left("after a signal");
    // So does a terminal that is closed.
    fs::remove_file(scratch.join("number")).expect("it is there");
    terminal.line(&format!("sh -c 'echo $$ > number; exec {command} top -p {}'", target.pid));
    terminal.wait_for("a row", |screen| screen.contains("[attached"));
    run::wait_for(&scratch.join("number"));
    let number = fs::read_to_string(scratch.join("number")).expect("a number");
    drop(terminal);
    let task = Path::new("/proc").join(number.trim());
    run::wait_until(&"its end without a terminal", || !task.exists());
    assert_left("without a terminal");
    // It has checked all of its results.
    fs::write(scratch.join("over"), "").expect("a folder of our own");
    run::signal("TERM", &target.pid.to_string());
    let outcome = target.finish();
    assert_eq!((outcome.end, outcome.text()), (run::End::Status(7), "right\n".to_owned()));
}
